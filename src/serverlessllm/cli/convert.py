"""`sllm convert`: raw weights → a checkpoint, on this machine, without a server."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.checkpoint.sources.base import RawCheckpoint


def convert(
    source: Annotated[Path, typer.Argument(help="A folder of weights, or one file of them.")],
    destination: Annotated[Path, typer.Argument(help="Folder for model.bin and model.idx.")],
    model: Annotated[
        str | None, typer.Option(help="The model's name. [default: the source's]")
    ] = None,
    revision: Annotated[str, typer.Option(help="Recorded in the index.")] = "local",
    json: options.Json = False,
) -> None:
    """Convert raw weights to a checkpoint, without a server."""
    from serverlessllm.checkpoint.convert import ChunkDone
    from serverlessllm.checkpoint.convert import convert as convert_raw
    from serverlessllm.cli.output import print_json, progress_bar
    from serverlessllm.core.errors import SLLMError
    from serverlessllm.core.units import format_size

    made = not destination.exists()
    try:
        raw = _open(source, model, revision)
        destination.mkdir(parents=True, exist_ok=True)
        with progress_bar(source.name) as bar:

            def show(chunk: ChunkDone) -> None:
                bar("converting", chunk.offset + chunk.size_bytes, chunk.total_bytes)

            done = convert_raw(raw, destination, on_chunk=show)
    except SLLMError as error:
        raise Failure(error.message) from error
    except OSError as error:
        raise Failure(f"{error.filename or destination}: {error.strerror}") from error
    finally:
        if made:
            with suppress(OSError):  # a checkpoint is in it, or what the next run resumes from
                destination.rmdir()
    if json:
        print_json({"checkpoint": done.id, "size_bytes": done.size_bytes})
        return
    print(f"{destination}: checkpoint {done.id}, {format_size(done.size_bytes)}")


def _open(source: Path, model: str | None, revision: str) -> RawCheckpoint:
    from serverlessllm.checkpoint.sources.base import open_file, open_folder
    from serverlessllm.core.ids import model_name, parse_model_id

    if not source.exists():
        raise Failure(f"{source}: no such file or folder")
    named = source.resolve()
    name = model or (named.name if source.is_dir() else named.stem)
    name = model_name(parse_model_id(name))
    if source.is_dir():
        return open_folder(source, model=name, revision=revision)
    return open_file(source, model=name, revision=revision)
