"""A checkpoint's way through the tiers: cold, warm, after a restart, evicted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serverlessllm.core.cluster import CacheLevel

DRAM, NVME, DEVICE, STORE = CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.DEVICE, CacheLevel.STORE


async def test_cold_then_warm(bench, make_sample):
    sample = await bench.publish(make_sample("a"))
    async with bench.loader() as loader:
        async with await loader.load(sample.ref, DEVICE) as cold:
            assert cold.bin_path.read_bytes() == sample.data
            assert cold.index_path.read_bytes() == sample.index
            assert cold.level is DRAM
            assert [(hop.hop, hop.bytes_moved) for hop in cold.hops] == [
                ("store→dram", len(sample.data)),
                ("dram→device", 0),
            ]
        assert bench.store.bytes_read == len(sample.data)
        async with await loader.load(sample.ref, DEVICE) as warm:
            assert sum(hop.bytes_moved for hop in warm.hops) == 0
        await loader.settled()
        assert bench.nvme(sample).read_bytes() == sample.data
        assert bench.store.bytes_read == len(sample.data)
        assert bench.leftovers() == []
