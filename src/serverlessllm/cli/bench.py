"""`sllm bench`: what a load is worth on this machine."""

from __future__ import annotations

from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serverlessllm.cli import options
from serverlessllm.cli.endings import end_signals
from serverlessllm.cli.failure import Failure
from serverlessllm.cli.local import Checkpoint, open_local

if TYPE_CHECKING:
    from serverlessllm.cli.local import LocalCheckpoint
    from serverlessllm.config.load import Loaded
    from serverlessllm.loader.trial.report import Report

app = typer.Typer(
    help="Measure this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Tier(StrEnum):
    """Where a measured load begins."""

    STORE = "store"
    NVME = "nvme"
    DRAM = "dram"
    DEVICE = "device"


@app.callback()
def _bench() -> None:
    """Measure this machine."""


@app.command("load")
def load(
    checkpoint: Checkpoint,
    tier: Annotated[
        Tier,
        typer.Option(
            help="store or nvme: from there to DRAM. dram: to a second process. device: from "
            "DRAM to the GPUs."
        ),
    ] = Tier.NVME,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Medians are of so many.")] = 5,
    disk: Annotated[
        Path | None,
        typer.Option(
            help="A directory on the disk to measure. [default: where the nvme tier lies]",
            show_default=False,
        ),
    ] = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Load a checkpoint again and again, beside what the machine itself can do.

    In private tiers: nothing that serves is touched, and nothing is left. Takes room for a copy
    of the checkpoint in /dev/shm, and with --tier nvme for one on the disk.
    """
    from serverlessllm.cli.output import print_json

    loaded = options.settings(config, data_dir)
    found = open_local(checkpoint, data_dir, config)
    report = _measure(found, tier, rounds, disk or _nvme_disk(loaded), loaded)
    if json:
        print_json(report)
    else:
        _print(report)


def _measure(found: LocalCheckpoint, tier: Tier, rounds: int, disk: Path, loaded: Loaded) -> Report:
    import msgspec

    from serverlessllm.cli.output import progress_bar
    from serverlessllm.core.cluster import CacheLevel
    from serverlessllm.core.errors import OutOfSpace, SLLMError
    from serverlessllm.loader.device import open_accelerator
    from serverlessllm.loader.trial.measure import measure

    size_bytes = found.contents.size_bytes
    cuda = msgspec.structs.replace(loaded.settings.loader, device="cuda")
    with progress_bar(found.contents.model) as bar:
        try:
            return _run(
                measure(
                    found.index_path,
                    CacheLevel[tier.name],
                    disk=disk,
                    settings=loaded.settings.loader,
                    rounds=rounds,
                    tell=lambda number: bar("loading", number * size_bytes, rounds * size_bytes),
                    open_accelerator=lambda: open_accelerator(cuda),
                )
            )
        except OutOfSpace as error:
            raise Failure(error.message, "free some, or measure a smaller checkpoint") from error
        except SLLMError as error:
            cure = "--tier dram measures what a CPU reads" if tier is Tier.DEVICE else ""
            raise Failure(error.message, cure) from error
        except OSError as error:
            raise Failure(
                f"{error.filename or disk}: {error.strerror}", "--disk names another directory"
            ) from error


def _run(work: Coroutine[Any, Any, Report]) -> Report:
    """Run to the end; any signal to end, like SIGINT, ends it without leaving anything."""
    import asyncio

    import uvloop

    async def under_signals() -> Report:
        task = asyncio.current_task()
        assert task is not None
        for number in end_signals():
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(under_signals())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _nvme_disk(loaded: Loaded) -> Path:
    """A directory that exists, on the disk of the nvme tier."""
    path = Path(loaded.settings.loader.nvme_dir or loaded.paths.nvme_dir).absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _print(report: Report) -> None:
    from serverlessllm.cli.output import print_table
    from serverlessllm.core.units import format_count, format_size

    print(
        f"{report.hop}: {report.share:.2f} of this machine's limit, {_rate(report.bytes_s)} "
        f"({format_size(report.size_bytes)}, median of {format_count(report.rounds, 'round')})"
    )
    print(f"limit: {_rate(report.limit_bytes_s)}, {report.limit}\n")
    print_table(
        ("stage", "#ms", "#share"),
        (
            *(_row(stage.name, stage.seconds, report.seconds) for stage in report.stages),
            _row("the load", report.seconds, report.seconds),
        ),
    )
    print()
    if report.copied_bytes is None:
        print(f"verification: {report.verify_share:.1%} of a load, from passes with and without it")
    print(f"cpu: {report.cpu_s_per_gib:.2f} s per GiB")
    if report.copied_bytes is not None:
        print(f"copied in the other process: {report.copied_bytes} bytes")
    elif report.cached_share is not None:
        print(f"page cache: held {report.cached_share:.1%} of the file when a round began")


def _row(name: str, seconds: float, of: float) -> tuple[str, str, str]:
    return name, f"{seconds * 1000:.1f}", f"{seconds / of:.0%}"


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.2f} GB/s"
