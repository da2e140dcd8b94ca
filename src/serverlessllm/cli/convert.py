"""`sllm convert`: raw weights → a checkpoint, on this machine, without a server."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.backends.inside.quantize.messages import Report
    from serverlessllm.checkpoint.convert import Converted
    from serverlessllm.checkpoint.index import Quantization
    from serverlessllm.checkpoint.sources.base import RawCheckpoint
    from serverlessllm.cli.output import Bar


def convert(
    source: Annotated[Path, typer.Argument(help="A folder of weights, or one file of them.")],
    destination: Annotated[Path, typer.Argument(help="Folder for model.bin and model.idx.")],
    model: Annotated[
        str | None, typer.Option(help="The model's name. [default: the source's]")
    ] = None,
    revision: Annotated[str, typer.Option(help="Recorded in the index.")] = "local",
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="int8|int4",
            help="Round the weights of the layers to 8 or 4 bits, for the transformers backend.",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale. [default: 32 for int4, a whole row for int8]",
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Also compare what the quantised model answers with what the original does: "
            "needs memory for the original.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Convert raw weights to a checkpoint, without a server."""
    from serverlessllm.cli.output import print_json, progress_bar
    from serverlessllm.core.errors import InvalidRequest, SLLMError
    from serverlessllm.core.units import format_size

    if quantize is None and (group_size is not None or evaluate):
        raise Failure("--group-size and --evaluate go with --quantize", exit_status=2)
    made = not destination.exists()
    report = None
    try:
        raw = _open(source, model, revision)
        with progress_bar(source.name) as bar:
            if quantize is None:
                done = _convert(raw, destination, bar)
            else:
                asked = _Quantizing(quantize, group_size, evaluate)
                done, report = _convert_quantized(raw, source, destination, asked, bar)
    except InvalidRequest as error:
        raise Failure(error.message, exit_status=2) from error
    except SLLMError as error:
        raise Failure(error.message) from error
    except OSError as error:
        raise Failure(f"{error.filename or destination}: {error.strerror}") from error
    finally:
        if made:
            with suppress(OSError):  # a checkpoint is in it, or what the next run resumes from
                destination.rmdir()
    if json:
        facts: dict[str, object] = {"checkpoint": done.id, "size_bytes": done.size_bytes}
        print_json(facts | ({"quantization": report} if report else {}))
        return
    print(f"{destination}: checkpoint {done.id}, {format_size(done.size_bytes)}")
    if report is not None:
        _print_report(report)


class _Quantizing(NamedTuple):
    """What was asked for, unchecked."""

    scheme: str
    group_size: int | None
    evaluate: bool


def _convert(
    raw: RawCheckpoint,
    destination: Path,
    bar: Bar,
    quantization: Quantization | None = None,
) -> Converted:
    from serverlessllm.checkpoint.convert import ChunkDone
    from serverlessllm.checkpoint.convert import convert as convert_raw

    destination.mkdir(parents=True, exist_ok=True)

    def show(chunk: ChunkDone) -> None:
        bar("converting", chunk.offset + chunk.size_bytes, chunk.total_bytes)

    return convert_raw(raw, destination, on_chunk=show, quantization=quantization)


def _convert_quantized(
    raw: RawCheckpoint, source: Path, destination: Path, asked: _Quantizing, bar: Bar
) -> tuple[Converted, Report]:
    """By way of a quantised folder beside the destination."""
    from serverlessllm.backends.inside.quantize.messages import QuantizeRequest
    from serverlessllm.checkpoint.index import Quantization
    from serverlessllm.checkpoint.quantized import scheme
    from serverlessllm.checkpoint.sources.base import open_folder
    from serverlessllm.cli import quantize

    chosen = scheme(asked.scheme, asked.group_size)
    quantize.check_installed()
    with quantize.ended_by_signals(), quantize.work_folder(destination) as work:
        request = QuantizeRequest(
            source=str(source),
            work=str(work.path),
            parent=os.getpid(),
            scheme=chosen,
            evaluate=asked.evaluate,
        )
        report = quantize.quantize(request, work.lock, lambda at: bar(at.stage, at.done, at.total))
        rounded = open_folder(
            work.path,
            model=raw.model,
            source=raw.source,
            revision=raw.revision,
            license=raw.license,
        )
        done = Quantization(
            scheme=report.scheme,
            library=report.library,
            group_size=report.group_size,
            error=report.error,
        )
        return _convert(rounded, destination, bar, done), report


def _print_report(report: Report) -> None:
    from serverlessllm.core.units import format_count, format_size

    share = report.tensor_bytes / report.source_bytes
    grain = f"groups of {report.group_size}" if report.group_size else "a scale a row"
    print(
        f"{report.scheme}, {grain}, by {report.library}: "
        f"{format_size(report.source_bytes)} of tensors → {format_size(report.tensor_bytes)} "
        f"({share:.0%})"
    )
    print(
        f"{format_count(len(report.quantized), 'weight')} of the layers quantised, "
        f"{format_count(len(report.kept), 'tensor')} kept as they were"
    )
    print(
        f"relative error {report.error:.2%}, worst {report.worst.error:.2%} ({report.worst.name})"
    )
    found = report.evaluation
    if found is not None:
        print(
            f"against the original on {format_count(found.tokens, 'token')}: same first choice "
            f"{found.top1_agreement:.1%}, KL divergence {found.kl_mean:.4f} (worst "
            f"{found.kl_max:.4f})"
        )


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
