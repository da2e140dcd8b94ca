"""How a serving process runs and ends: uvloop, and what its signals mean."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import uvloop

Main = Callable[[asyncio.Event], Awaitable[None]]


def run(main: Main) -> None:
    """Run `main` on uvloop until it returns.

    The first SIGTERM or SIGINT sets its event (drain); the second cancels it (close at once);
    the third ends the process where it stands.

    Raises:
        KeyboardInterrupt: it took a second signal.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        finished = runner.run(_under_signals(main))
    if not finished:
        raise KeyboardInterrupt


async def _under_signals(main: Main) -> bool:
    """Whether `main` came to its own end, rather than being cancelled by a second signal."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    stop = asyncio.Event()
    seen = 0

    def on_signal() -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            stop.set()
        elif seen == 2:
            task.cancel()
        else:
            os._exit(130)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await main(stop)
    except asyncio.CancelledError:
        if seen < 2:
            raise
        return False
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return True
