"""A trial of DRAM → device, beside copies from locked memory."""

from __future__ import annotations

import asyncio
from statistics import median

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.accelerator import Accelerator
from serverlessllm.loader.measure import measure_device
from serverlessllm.loader.plan import hop_name
from serverlessllm.loader.service import Loader
from serverlessllm.loader.tiers.staging import Staging
from serverlessllm.loader.trial.report import Report, Stage, Tell, cost_of, make_report

_RING_BLOCKS = 16


async def try_device(
    loader: Loader,
    ref: CheckpointRef,
    beside: Accelerator,
    *,
    rounds: int,
    tell: Tell,
) -> Report:
    """The checkpoint is brought to DRAM once, and in each round from there to the devices.

    `beside`: an accelerator of our own, for the limit; closed here. Raises what `Loader.load`
    does.
    """
    ring = Staging(_RING_BLOCKS)
    limits, loads = [], []
    try:
        await asyncio.to_thread(beside.start, ring)
        async with await loader.load(ref, CacheLevel.DRAM):
            for number in range(rounds):
                tell(number)
                limits.append(await asyncio.to_thread(measure_device, beside, ring))
                loads.append(await cost_of(loader.load(ref, CacheLevel.DEVICE)))
                await loader.evict(ref.id, CacheLevel.DRAM)
    finally:
        await asyncio.to_thread(beside.close)
    hop = hop_name(CacheLevel.DRAM, CacheLevel.DEVICE)
    return make_report(
        ref,
        hop=hop,
        loads=loads,
        limit="copies from locked memory to the first GPU",
        limit_bytes_s=median(limits),
        stages=(Stage(name=hop, seconds=median(load.seconds for load in loads)),),
    )
