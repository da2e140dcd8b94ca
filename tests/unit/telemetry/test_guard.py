"""Tasks that must not end: a bug is told, and does not stop them for good."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from serverlessllm.telemetry import TelemetrySettings, configure_logging, log
from serverlessllm.telemetry.guard import keep_running
from serverlessllm.testing.clock import VirtualClock


async def test_what_ends_is_told_and_starts_again_after_the_pause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(TelemetrySettings())
    starts = 0

    async def main() -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            raise OSError("the disk is gone")
        if starts == 3:
            await asyncio.Event().wait()

    clock = VirtualClock()
    task = asyncio.create_task(
        keep_running("sweeper", main, out=log("test"), clock=clock, restart_s=2.0)
    )
    await clock.advance(1.9)
    assert starts == 1
    (line,) = [msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines()]
    assert (line["level"], line["component"], line["task"]) == ("error", "test", "sweeper")
    assert "the disk is gone" in str(line)
    await clock.advance(60.0)
    assert starts == 3
    assert "ended by itself" in capsys.readouterr().err
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
