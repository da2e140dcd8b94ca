"""How a serving process runs and ends: uvloop, and what its signals mean."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import uvloop

from serverlessllm.bootstrap import Control

Main = Callable[[Control], Awaitable[None]]


def run(main: Main) -> None:
    """Run `main` on uvloop until it returns.

    The first SIGTERM or SIGINT asks it to stop (drain); the second cancels it (close at once);
    the third ends the process where it stands. SIGHUP asks it to reload, unless it tells that the
    terminal which this process was started on has closed: then it asks it to stop, once. Under
    `nohup` a terminal may close.

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
    heard = _Heard(task)
    for number, handler in heard.handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        await main(heard.control)
    except asyncio.CancelledError:
        if heard.ends < 2:
            raise
        return False
    finally:
        for number in heard.handlers:
            loop.remove_signal_handler(number)
    return True


class _Heard:
    """The signals so far, and what the process is told by them."""

    def __init__(self, main: asyncio.Task[bool]) -> None:
        self.control = Control()
        self.ends = 0
        """How often it was asked to end."""
        self.handlers = {
            signal.SIGTERM: self._end,
            signal.SIGINT: self._end,
            signal.SIGHUP: self._hang_up,
        }
        self._main = main
        self._ends_with_terminal = (
            _has_terminal() and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        )

    def _end(self) -> None:
        self.ends += 1
        if self.ends == 1:
            self.control.stop.set()
        elif self.ends == 2:
            self._main.cancel()
        else:
            os._exit(130)

    def _hang_up(self) -> None:
        if not self._ends_with_terminal or _has_terminal():
            self.control.reload()
        elif not self.ends:  # the shell says it, and the kernel again: that is no second thought
            self._end()


def _has_terminal() -> bool:
    """Whether a terminal controls this process; no more once it has closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
