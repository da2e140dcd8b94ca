"""What bench/edge.py found: as tables for people, and in the documents."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from bench.edges.measure import LOADS, Found
from bench.edges.process import ROOT
from bench.edges.targets import RUST

PAGE = ROOT / "docs" / "benchmarks.md"
_SECTION = re.compile(r"(?<=<!-- edge:begin -->\n).*(?=<!-- edge:end -->)", re.DOTALL)
_STREAMS = LOADS[-1].name
OURS = "orchestrator"
BOUNDS = (
    ("32 connections", "rust", 0.6),
    ("32 connections", "nginx", 3.0),
    ("5,000/s", "rust", 1.0),
    ("5,000/s", "nginx", 1.6),
    ("5,000/s, own core", "rust", 1.0),
    ("5,000/s, own core", "nginx", 1.6),
    (_STREAMS, "rust", 1.0),
)
"""(load, peer, our CPU as a multiple of the peer's at most); `rust`: the better Rust router."""
HELD_MAX = 1.1
"""p99 of good traffic beside 2,000 idle and slow connections, as a multiple of that without."""


def tables(found: Sequence[Found]) -> str:
    """Every figure, in Markdown."""
    loads = [load.name for load in LOADS]
    measured = [load for load in loads if any(load in one.samples for one in found)]
    parts = [_held(found)]
    if measured:
        parts = [*_loads(found, measured), *parts]
    return "\n\n".join(part for part in parts if part)


def _loads(found: Sequence[Found], measured: Sequence[str]) -> list[str]:
    return [
        "CPU, µs a request (streams: a chunk), and its multiple of nginx's:",
        _table(found, measured, _cpu(found)),
        "Requests (chunks) a second:",
        _table(found, measured, lambda one, load: _number(one.median(load, "rate"))),
        "Latency p50 / p99, µs (streams: to the first byte):",
        _table(found, measured, _latency),
    ]


def verdicts(found: Sequence[Found]) -> list[tuple[bool, str]]:
    """Each bound: whether it holds, and the sentence."""
    said = []
    ours = next((one for one in found if one.name == OURS), None)
    if ours is None or ours.why_not:
        return [(False, f"{OURS}: {'not measured' if ours is None else ours.why_not}")]
    for load, peer, most in BOUNDS:
        cost, theirs = ours.median(load, "cpu_us"), _cost(found, peer, load)
        if cost is None or theirs is None:
            continue
        ratio = cost / theirs
        what = "the better Rust router" if peer == "rust" else peer
        unit = "chunk" if load == _STREAMS else "request"
        said.append(
            (
                ratio <= most,
                f"{load}: a {unit} costs {ratio:.2f} x {what} {_bound(ratio, most)}",
            )
        )
    if ours.held:
        ratio = median(one.beside_p99_us / one.alone_p99_us for one in ours.held)
        machine = median(one.elsewhere_p99_us / one.alone_p99_us for one in ours.held)
        text = f"p99 beside 2,000 slow connections: {ratio:.2f} x {_bound(ratio, HELD_MAX)}"
        said.append((ratio <= HELD_MAX, f"{text}; beside another server's: {machine:.2f} x"))
    return said


def _bound(ratio: float, most: float) -> str:
    return f"(at most {most}): {'holds' if ratio <= most else 'DOES NOT HOLD'}"


def document(found: Sequence[Found]) -> None:
    """Put the tables and verdicts into docs/benchmarks.md."""
    lines = "\n".join(f"- {text}" for _, text in verdicts(found))
    text = f"\n{tables(found)}\n\n{lines}\n\n"
    PAGE.write_text(_SECTION.sub(lambda _: text, PAGE.read_text()))


def _cost(found: Sequence[Found], peer: str, load: str) -> float | None:
    names = RUST if peer == "rust" else (peer,)
    costs = [one.median(load, "cpu_us") for one in found if one.name in names]
    return min((cost for cost in costs if cost is not None), default=None)


def _cpu(found: Sequence[Found]) -> Callable[[Found, str], str]:
    def cell(one: Found, load: str) -> str:
        cost, nginx = one.median(load, "cpu_us"), _cost(found, "nginx", load)
        if cost is None:
            return "-"
        return f"{cost:.1f}" + (f" ({cost / nginx:.2f})" if nginx else "")

    return cell


def _latency(one: Found, load: str) -> str:
    middle, tail = one.median(load, "p50_us"), one.median(load, "p99_us")
    errors = sum(sample.errors for sample in one.samples.get(load, ()))
    if middle is None or tail is None:
        return "-"
    return f"{middle:.0f} / {tail:.0f}" + (f" ({errors} errors)" if errors else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _table(found: Sequence[Found], loads: Sequence[str], cell: Callable[[Found, str], str]) -> str:
    lines = [f"| | {' | '.join(loads)} |", "|---|" + "---:|" * len(loads)]
    for one in found:
        if one.why_not:
            lines.append(f"| {one.name} | {one.why_not} |" + " |" * (len(loads) - 1))
        else:
            lines.append(f"| {one.name} | " + " | ".join(cell(one, load) for load in loads) + " |")
    return "\n".join(lines)


def _held(found: Sequence[Found]) -> str:
    rows = [one for one in found if one.held]
    if not rows:
        return ""
    title = (
        "2,000 connections (1,000 idle, 1,000 slow) beside 1,000 good requests a second, p50 / p99 "
        "in µs; `elsewhere`: the 2,000 are another server's, on the same machine:"
    )
    lines = [
        f"{title}\n",
        "| | KiB an idle one | without | beside | elsewhere | p99 beside | elsewhere | errors |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        rounds = one.held
        memory = median(held.bytes_each for held in rounds) / 1024
        cells = [
            f"{memory:.1f}",
            _pair((held.alone_p50_us, held.alone_p99_us) for held in rounds),
            _pair((held.beside_p50_us, held.beside_p99_us) for held in rounds),
            _pair((held.elsewhere_p50_us, held.elsewhere_p99_us) for held in rounds),
            f"{median(held.beside_p99_us / held.alone_p99_us for held in rounds):.2f} x",
            f"{median(held.elsewhere_p99_us / held.alone_p99_us for held in rounds):.2f} x",
            str(sum(held.errors for held in rounds)),
        ]
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(rounds: Iterable[tuple[float, float]]) -> str:
    """Medians of p50 and of p99."""
    middles, tails = zip(*rounds, strict=True)
    return f"{median(middles):.0f} / {median(tails):.0f}"
