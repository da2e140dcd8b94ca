"""A trial of DRAM → another process: found, mapped where it lies, read; nothing is copied."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from statistics import median
from time import monotonic

import msgspec

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import LoadFailed
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.service import Loader
from serverlessllm.loader.trial.mapper import READY, Found
from serverlessllm.loader.trial.report import Cost, Report, Tell, ladder, make_report

MAP_STAGE = "map in the other process"
_MAPPER = "serverlessllm.loader.trial.mapper"
_MAPPER_S_MAX = 600.0
"""For the second process to start, or to read the whole checkpoint."""


class _Handed(msgspec.Struct, frozen=True, kw_only=True):
    asked_s: float
    held_s: float
    found: Found


async def try_dram(loader: Loader, ref: CheckpointRef, rounds: int, tell: Tell) -> Report:
    """The checkpoint is brought to DRAM once; in each round a new process reads it there.

    Raises:
        LoadFailed: the second process failed.
    """
    handed = []
    async with await loader.load(ref, CacheLevel.DRAM):
        for number in range(rounds):
            tell(number)
            handed.append(await _hand_over(loader, ref))
    return make_report(
        ref,
        hop="dram→process",
        loads=[
            Cost(seconds=one.found.read_s - one.asked_s, cpu_s=one.found.cpu_s) for one in handed
        ],
        limit="memcpy by one thread",
        limit_bytes_s=median(one.found.memcpy_bytes_s for one in handed),
        stages=ladder(
            (
                ("find and hold", [one.held_s - one.asked_s for one in handed]),
                (MAP_STAGE, [one.found.mapped_s - one.asked_s for one in handed]),
                ("read every byte there", [one.found.read_s - one.asked_s for one in handed]),
            )
        ),
        copied_bytes=max(one.found.copied_bytes for one in handed),
    )


async def _hand_over(loader: Loader, ref: CheckpointRef) -> _Handed:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with _mapper(theirs) as process, asyncio.timeout(_MAPPER_S_MAX):
            assert process.stdout is not None
            if await process.stdout.readline() != READY:
                raise LoadFailed("the second process of the trial did not start: see its message")
            asked_s = monotonic()
            async with await loader.load(ref, CacheLevel.DRAM) as resident:
                held_s = monotonic()
                fd = os.open(resident.bin_path, os.O_RDONLY)
                try:
                    socket.send_fds(ours, [b"."], [fd])
                finally:
                    os.close(fd)
                answer = await process.stdout.readline()
    try:
        found = msgspec.json.decode(answer, type=Found)
    except msgspec.DecodeError:
        raise LoadFailed("the second process of the trial failed: see its message") from None
    return _Handed(asked_s=asked_s, held_s=held_s, found=found)


@contextlib.asynccontextmanager
async def _mapper(stdin: socket.socket) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", _MAPPER), stdin=stdin.fileno(), stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
