"""Progress: not too often, and never a guess."""

from __future__ import annotations

from serverlessllm.loader.progress import LoadProgress, Meter
from serverlessllm.testing.clock import VirtualClock


async def test_reports_are_spaced_and_the_last_one_always_comes() -> None:
    clock = VirtualClock()
    seen: list[LoadProgress] = []
    meter = Meter(clock, 0.0495, seen.append)
    meter.begin("nvme→dram", 1000)
    for _ in range(99):
        await clock.advance(0.001)
        meter.add(10)
    meter.add(10)
    assert [progress.bytes_done for progress in seen] == [0, 500, 1000]
    assert seen[0].eta_s is None
    assert seen[1].eta_s is not None
    assert abs(seen[1].eta_s - 0.05) < 1e-6
    assert seen[-1].eta_s == 0
    assert abs(meter.elapsed_s - 0.099) < 1e-6


async def test_each_hop_begins_anew() -> None:
    clock = VirtualClock()
    seen: list[LoadProgress] = []
    meter = Meter(clock, 0.0, seen.append)
    meter.begin("queue", 10)
    await clock.advance(5)
    meter.begin("store→dram", 10)
    await clock.advance(1)
    meter.add(5)
    assert [(p.hop, p.bytes_done, p.eta_s) for p in seen] == [
        ("queue", 0, None),
        ("store→dram", 0, None),
        ("store→dram", 5, 1.0),
    ]
