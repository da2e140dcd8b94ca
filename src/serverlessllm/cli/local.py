"""A checkpoint on this machine, however it was named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.checkpoint.index import Index
    from serverlessllm.core.ids import CheckpointId

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A folder with model.bin and model.idx, one of these files, or the name of a model "
        "in the local store."
    ),
]


class LocalCheckpoint(NamedTuple):
    """Both files of one checkpoint; the index decoded."""

    id: CheckpointId
    contents: Index
    index_path: Path
    bin_path: Path


def open_local(name: str, data_dir: str | None, config: Path | None) -> LocalCheckpoint:
    """Find and decode the checkpoint.

    Raises:
        Failure: there is none, or its index is not valid.
    """
    from serverlessllm.checkpoint.index import checkpoint_id, decode_index
    from serverlessllm.core.errors import CheckpointError

    index_path = _find(name, data_dir, config)
    try:
        data = index_path.read_bytes()
        index = decode_index(data)
    except OSError as error:
        raise Failure(f"{index_path}: {error.strerror}") from error
    except CheckpointError as error:
        raise Failure(
            f"{index_path}: {error.message}", "convert the model again: sllm convert"
        ) from error
    return LocalCheckpoint(
        id=checkpoint_id(data),
        contents=index,
        index_path=index_path,
        bin_path=index_path.with_suffix(".bin"),
    )


def _find(name: str, data_dir: str | None, config: Path | None) -> Path:
    from serverlessllm.checkpoint.index import IDX_NAME

    path = Path(name)
    if path.is_dir() and (path / IDX_NAME).is_file():
        return path / IDX_NAME
    if path.suffix in {".idx", ".bin"} and path.exists():
        return path.with_suffix(".idx")
    stored = _in_store(name, data_dir, config)
    if stored is not None:
        return stored
    if name and path.exists():
        raise Failure(
            f"{path}: no checkpoint (model.bin and model.idx)",
            f"make one of raw weights: sllm convert {path} DEST",
        )
    raise Failure(
        f"{name!r}: no such folder or file, and no such model in the store of "
        f"{options.settings(config, data_dir).paths.data_dir}",
        "`sllm pull NAME` brings one there; --data-dir names another",
    )


def _in_store(name: str, data_dir: str | None, config: Path | None) -> Path | None:
    """The newest revision of a model in a store that is a folder of this machine."""
    from urllib.parse import unquote, urlsplit

    from serverlessllm.checkpoint.index import IDX_NAME
    from serverlessllm.core.errors import InvalidModelName
    from serverlessllm.core.ids import model_name, model_revision, parse_model_id

    try:
        model = parse_model_id(name)
    except InvalidModelName:
        return None
    loaded = options.settings(config, data_dir)
    url = urlsplit(loaded.settings.store_url or loaded.paths.store_dir.as_uri())
    if url.scheme != "file":
        return None
    folder = Path(unquote(url.path)) / model_name(model)
    found = sorted(
        folder.glob(f"{model_revision(model) or '*'}/{IDX_NAME}"), key=lambda p: p.stat().st_mtime
    )
    return found[-1] if found else None
