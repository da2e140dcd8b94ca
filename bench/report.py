"""What bench/load.py found: as values, as a table for people, and in the documents."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from statistics import median

import msgspec
from bench.bars import Bar, draw
from bench.place import ROOT
from bench.ready import Ready

from serverlessllm.core.units import GIB, format_count, format_size
from serverlessllm.loader.trial.dram import MAP_STAGE
from serverlessllm.loader.trial.report import Report

PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "benchmarks" / "load.svg"
_SECTION = re.compile(r"(?<=<!-- load:begin -->\n).*(?=<!-- load:end -->)", re.DOTALL)
_COLUMNS = (
    *("loader", "page cache", "÷ limit", "its time ÷ ours", "GB/s", "call returned"),
    *("CPU s/GiB", "memory"),
)
_MMAP, _NVME = "safetensors load_file", "ServerlessLLM, nvme → DRAM"


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What the script of a loader printed; see bench/peers/timed.py."""

    seconds: float = 0.0
    """From the call until every tensor was usable."""
    call_s: float = 0.0
    """Until the call returned."""
    reading_s: float = 0.0
    """To read a byte of each page when all are there: subtracted from `seconds`."""
    cpu_s: float = 0.0
    memory_bytes: int = 0
    """Most memory at any time, mapped pages counted, over what was there before."""
    size_bytes: int = 0
    tensors: int = 0
    sum: int = 0
    """Of a byte of each page of each tensor."""
    error: str | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of one loader's samples, or why there are none."""

    label: str
    cache: str
    ours: bool
    error: str | None = None
    seconds: float = 0.0
    call_s: float = 0.0
    reading_s: float = 0.0
    cpu_s_per_gib: float = 0.0
    memory_bytes: int = 0
    bytes_s: float = 0.0
    sums: tuple[int, ...] = ()

    @classmethod
    def of(cls, label: str, cache: str, samples: Sequence[Sample], *, ours: bool) -> Row:
        """The row of these samples."""
        error = next((sample.error for sample in samples if sample.error), None)
        if error is not None:
            return cls(label=label, cache=cache, ours=ours, error=error)
        size = samples[0].size_bytes
        seconds = median(sample.seconds for sample in samples)
        return cls(
            label=label,
            cache=cache,
            ours=ours,
            seconds=seconds,
            call_s=median(sample.call_s for sample in samples),
            reading_s=median(sample.reading_s for sample in samples),
            cpu_s_per_gib=median(sample.cpu_s for sample in samples) * GIB / size,
            memory_bytes=int(median(sample.memory_bytes for sample in samples)),
            bytes_s=size / seconds,
            sums=tuple({sample.sum for sample in samples}),
        )


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    size_bytes: int
    rounds: int
    limit_bytes_s: float
    limit: str
    rows: list[Row]
    nvme: Report
    """`sllm bench load --tier nvme` on the same checkpoint."""
    handover: Report
    """`sllm bench load --tier dram`."""
    ready: Ready

    def __post_init__(self) -> None:
        sums = {total for row in self.rows for total in row.sums}
        if len(sums) > 1:
            raise ValueError(f"the loaders did not all read the same weights: {sums}")

    def row(self, label: str) -> Row | None:
        """The one of this label, if it has figures."""
        found = (row for row in self.rows if row.label == label and row.error is None)
        return next(found, None)


def print_results(results: Results) -> None:
    """Everything, for a terminal."""
    print("\n".join(_markdown(results)))


def write_docs(results: Results) -> None:
    """The section of docs/benchmarks.md between its marks, and the plot."""
    text = "\n".join((*_markdown(results), "", "![loaders compared](benchmarks/load.svg)", ""))
    page, count = _SECTION.subn(lambda _: text, PAGE.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{PAGE}: no marks to write between")
    PAGE.write_text(page, encoding="utf-8")
    PLOT.parent.mkdir(exist_ok=True)
    PLOT.write_text(plot(results), encoding="utf-8")


def plot(results: Results) -> str:
    """All cold rows that have figures: rates as parts of the limit."""
    bars = [
        Bar(
            label=row.label,
            value=row.bytes_s / results.limit_bytes_s,
            text=f"{row.bytes_s / results.limit_bytes_s:.2f}   ({row.bytes_s / 1e9:.2f} GB/s)",
            ours=row.ours,
        )
        for row in results.rows
        if row.error is None and row.cache == "cold"
    ]
    return draw(
        "Weights from a cold disk to usable CPU tensors",
        f"{format_size(results.size_bytes)} of BF16, median of "
        f"{format_count(results.rounds, 'round')}, as parts of fio's best direct read; ours "
        "verifies every byte",
        bars,
        1.0,
        f"fio: {results.limit_bytes_s / 1e9:.2f} GB/s",
    )


def _markdown(results: Results) -> Iterator[str]:
    limit = results.limit_bytes_s
    yield (
        f"{format_size(results.size_bytes)}, median of "
        f"{format_count(results.rounds, 'interleaved round')}. "
        f"Limit: {limit / 1e9:.2f} GB/s ({results.limit})."
    )
    yield ""
    yield from _loaders(results)
    yield ""
    yield from _bounds(results)
    yield ""
    yield from _stages(results.nvme)


def _loaders(results: Results) -> Iterator[str]:
    ours = results.row(_NVME)
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    for row in sorted(results.rows, key=_place):
        if row.error is not None:
            yield f"| {row.label} | | no figures: {row.error} | | | | | |"
            continue
        name = f"**{row.label}**" if row.ours else row.label
        times = f"{row.seconds / ours.seconds:.2f}" if ours else ""
        cells = (
            name,
            row.cache if row.cache != "none" else "",
            f"{row.bytes_s / results.limit_bytes_s:.2f}",
            times,
            f"{row.bytes_s / 1e9:.2f}",
            f"{row.call_s * 1000:.0f} ms",
            f"{row.cpu_s_per_gib:.2f}",
            format_size(row.memory_bytes),
        )
        yield f"| {' | '.join(cells)} |"


def _place(row: Row) -> tuple[bool, bool, float]:
    """Cold before others, the quickest first; those without figures last."""
    return row.error is not None, row.cache != "cold", row.seconds


def _bounds(results: Results) -> Iterator[str]:
    yield "| what must hold | measured | bound | |"
    yield "|---|---|---|---|"
    ours, mapped = results.row(_NVME), results.row(_MMAP)
    peers = [
        row for row in results.rows if not row.ours and row.cache == "cold" and row.error is None
    ]
    if ours:
        yield _bound("nvme → DRAM, verified ÷ fio", ours.bytes_s / results.limit_bytes_s, 0.9)
    if ours and peers:
        best = min(peers, key=lambda row: row.seconds)
        yield _bound(
            f"nvme → DRAM ÷ the best peer ({best.label})", best.seconds / ours.seconds, 1.0
        )
    if ours and mapped:
        ceiling = results.limit_bytes_s / mapped.bytes_s
        yield _bound(
            "nvme → DRAM ÷ safetensors, cold, every page touched",
            mapped.seconds / ours.seconds,
            4.0,
            f"this disk allows {ceiling:.2f} at most (fio ÷ safetensors)",
        )
    yield _bound("verification, part of a cold load", results.nvme.verify_share, -0.05)
    map_s = _handover_s(results.handover)
    yield _bound("DRAM → a second process, ms", map_s * 1000, -10.0)
    yield _bound("bytes copied by it", float(results.handover.copied_bytes or 0), -0.0)
    forked = median(results.ready.forked_s)
    started = median(results.ready.from_pretrained_s)
    yield _bound(
        "SmolLM2-135M ready, forked from the template, weights in DRAM, s",
        forked,
        -0.25,
        f"a process with from_pretrained: {started:.2f} s, {started / forked:.0f} times as long; "
        f"executed without the template: {median(results.ready.executed_s):.2f} s",
    )


def _handover_s(report: Report) -> float:
    """Until the second process has the bytes mapped."""
    names = [stage.name for stage in report.stages]
    upto = names.index(MAP_STAGE) + 1
    return sum(stage.seconds for stage in report.stages[:upto])


def _bound(what: str, value: float, bound: float, note: str = "") -> str:
    """A row; a negative bound is one from above."""
    at_most = str(bound).startswith("-")
    holds = value <= -bound if at_most else value >= bound
    sign = "≤" if at_most else "≥"
    verdict = "holds" if holds else "**missed**"
    return (
        f"| {what} | {value:.2f} | {sign} {abs(bound):g} | {verdict}{': ' if note else ''}{note} |"
    )


def _stages(report: Report) -> Iterator[str]:
    yield "| nvme → DRAM, stage by stage | ms | part |"
    yield "|---|---|---|"
    for stage in report.stages:
        yield (
            f"| {stage.name} | {stage.seconds * 1000:.0f} | {stage.seconds / report.seconds:.0%} |"
        )
