"""What a trial found out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from statistics import median
from time import perf_counter, process_time

import msgspec

from serverlessllm.core.ids import CheckpointId
from serverlessllm.core.models import CheckpointRef
from serverlessllm.core.units import GIB
from serverlessllm.loader.service import Resident

Tell = Callable[[int], None]
"""Called with the number of each round that begins."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a load. The seconds of all stages add up to those of the load."""

    name: str
    seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of all rounds of one trial."""

    checkpoint: CheckpointId
    size_bytes: int
    hop: str
    """Such as `nvme→dram`."""
    rounds: int
    seconds: float
    """One load."""
    bytes_s: float
    limit: str
    """What the machine's limit was measured with."""
    limit_bytes_s: float
    share: float
    """`bytes_s` ÷ `limit_bytes_s`."""
    stages: tuple[Stage, ...]
    verify_share: float
    """What the digests add to the time of a load, as part of it: 0..1. From passes with and
    without them, side by side; 0 where nothing is verified."""
    cpu_s_per_gib: float
    """CPU seconds of this process, user and system, per GiB."""
    cached_share: float | None
    """Most of the source that the page cache held when a round began; None: the kernel does not
    tell."""
    copied_bytes: int | None = None
    """Private memory that a second process took for the bytes; None where there is none."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Of one load."""

    seconds: float
    cpu_s: float
    """Of all threads of this process, user and system."""


async def cost_of(load: Awaitable[Resident]) -> Cost:
    """Wait for a load, and let go of what it brought."""
    cpu_s, started_s = process_time(), perf_counter()
    resident = await load
    cost = Cost(seconds=perf_counter() - started_s, cpu_s=process_time() - cpu_s)
    resident.release()
    return cost


def make_report(
    ref: CheckpointRef,
    *,
    hop: str,
    loads: Sequence[Cost],
    limit: str,
    limit_bytes_s: float,
    stages: tuple[Stage, ...],
    verify_s: float = 0.0,
    cached_share: float | None = None,
    copied_bytes: int | None = None,
) -> Report:
    """The report of these loads. `verify_s`: what the digests add to one."""
    size = ref.size_bytes
    seconds = median(load.seconds for load in loads)
    return Report(
        checkpoint=ref.id,
        size_bytes=size,
        hop=hop,
        rounds=len(loads),
        seconds=seconds,
        bytes_s=size / seconds,
        limit=limit,
        limit_bytes_s=limit_bytes_s,
        share=size / seconds / limit_bytes_s,
        stages=stages,
        verify_share=verify_s / seconds,
        cpu_s_per_gib=median(load.cpu_s for load in loads) * GIB / size,
        cached_share=cached_share,
        copied_bytes=copied_bytes,
    )


def ladder(steps: Sequence[tuple[str, Sequence[float]]]) -> tuple[Stage, ...]:
    """Stages from the seconds of rounds that did one thing more each time, the whole load last:
    each step is worth what its median adds to the one before, and nothing where noise is larger
    than the step."""
    stages = []
    reached = 0.0
    whole = median(steps[-1][1])
    for name, samples in steps:
        total = min(whole, max(reached, median(samples)))
        stages.append(Stage(name=name, seconds=total - reached))
        reached = total
    return tuple(stages)
