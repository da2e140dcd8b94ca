"""The converter's process, on asyncio's loop and on the one that servers run on."""

import asyncio
import os
import signal
from asyncio.subprocess import Process
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import ModelId
from serverlessllm.ingest.messages import WorkRequest
from serverlessllm.ingest.process import WorkerGone, WorkerProcess
from serverlessllm.ingest.settings import IngestSettings

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


def converter() -> WorkerProcess:
    request = WorkRequest(
        model=ModelId("m"), source="file:///none", settings=IngestSettings(), parent=os.getpid()
    )
    return WorkerProcess(request, SystemClock())


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_one_that_is_gone_is_told_nothing_and_reported(loop_factory: LoopFactory) -> None:
    async def main() -> None:
        async with converter() as worker:
            os.kill(worker.pid, signal.SIGKILL)
            for _ in range(2):
                with pytest.raises(WorkerGone, match="status -9"):
                    await worker.report()
                await worker.proceed("/none")

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop_factory", LOOPS)
def test_one_that_dies_before_it_is_asked_is_reported(
    monkeypatch: pytest.MonkeyPatch, loop_factory: LoopFactory
) -> None:
    start = asyncio.create_subprocess_exec

    async def stillborn(*words: str, **options: Any) -> Process:
        process = await start(*words, **options)
        process.kill()
        await process.wait()
        return process

    async def main() -> None:
        async with converter() as worker:
            with pytest.raises(WorkerGone, match="status -9"):
                await worker.report()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", stillborn)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
