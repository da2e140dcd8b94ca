"""Background tasks that must not end: when one does, everybody hears of it and it starts again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from serverlessllm.core.clock import Clock
from serverlessllm.telemetry.logs import Log


async def keep_running(
    name: str, main: Callable[[], Awaitable[None]], *, out: Log, clock: Clock, restart_s: float
) -> None:
    """Run `main` for as long as nobody cancels this; after a bug ended it, anew in `restart_s`."""
    while True:
        try:
            await main()
            out.error("background task ended by itself", task=name)
        except Exception:  # noqa: BLE001 - boundary of a task
            out.error("background task ended by a bug", exc_info=True, task=name)
        await clock.sleep(restart_s)
