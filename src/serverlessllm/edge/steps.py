"""A handler without a task: whatever it waits for runs it on, until it needs the event loop.

A task, its context and its wake-ups through the loop's queue cost a short request more than its
policy does, and a turn of the loop (with its system call) each. A warm request waits only for one
connection, whose bytes are an event already: that event runs the handler on directly. As soon as
the handler waits for anything else it becomes an ordinary task, and nobody can tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, Final, Protocol


class Steps(Protocol):
    """Whoever is run on by what it waits for."""

    def step(self) -> None:
        """What it waits for has changed."""
        ...

    def cancel(self) -> asyncio.Task[None] | None:
        """End it early; the task that does."""
        ...


class Run:
    """One coroutine on its way. Nothing but cancellation may escape it."""

    __slots__ = ("_coroutine", "_loop", "finished", "task", "waits")

    def __init__(
        self, coroutine: Coroutine[Any, None, None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._coroutine = coroutine
        self._loop = loop
        self.task: asyncio.Task[None] | None = None
        """What runs it from now on, if something must."""
        self.waits = False
        """Set by what it awaits: `step` will be called."""
        self.finished = False

    def step(self) -> None:
        """Run on until it waits; without effect once a task runs it."""
        if self.task is not None or self.finished:
            return
        outer = _now.run
        _now.run = self
        self.waits = False
        try:
            awaited = self._coroutine.send(None)
        except StopIteration:
            self.finished = True
            return
        finally:
            _now.run = outer
        if not self.waits and self.task is None:
            self.become_task(awaited)

    def cancel(self) -> asyncio.Task[None] | None:
        """Cancel it as a task is cancelled, in the loop's next turn; the task that ends it."""
        if self.finished:
            return None
        task = self.task or self.become_task()
        task.cancel()
        return task

    def become_task(self, awaited: asyncio.Future[Any] | None = None) -> asyncio.Task[None]:
        """Let a task run it from where it stands, which is waiting for `awaited`."""
        rest = self._coroutine if awaited is None else _rest(self._coroutine, awaited)
        self.task = self._loop.create_task(rest)
        return self.task


async def _rest(coroutine: Coroutine[Any, None, None], awaited: asyncio.Future[Any]) -> None:
    """What is left of a coroutine that waits for `awaited`."""
    await _Rest(coroutine, awaited)


class _Rest:
    """Passes on what a running coroutine waits for, and how that ended."""

    def __init__(self, coroutine: Coroutine[Any, None, None], awaited: asyncio.Future[Any]) -> None:
        self._coroutine = coroutine
        self._awaited: Any = awaited

    def __await__(self) -> Generator[Any, None, None]:
        coroutine = self._coroutine
        try:
            while True:
                try:
                    yield self._awaited
                except BaseException as error:  # noqa: BLE001 - all of them are the coroutine's
                    self._awaited = coroutine.throw(error)
                else:
                    self._awaited = coroutine.send(None)
        except StopIteration:
            return


class _Now:
    """Who is stepping."""

    run: Run | None = None


class _Pause:
    """Awaited: the handler stands still until its next step."""

    def __await__(self) -> Generator[None, None, None]:
        yield


class _InTask:
    def __await__(self) -> Generator[None, None, None]:
        if _now.run is not None:
            yield


_now: Final = _Now()
_pause: Final = _Pause()
_in_task: Final = _InTask()


def stepping() -> Run | None:
    """The handler that is being run on without a task; None inside of one."""
    return _now.run


def pause(run: Run) -> Awaitable[None]:
    """To be awaited by a handler that is stepping: whoever `run` was told to will run it on."""
    run.waits = True
    return _pause


def in_task() -> Awaitable[None]:
    """Await it to go on in a task: `asyncio.timeout`, task groups and the like must have one."""
    return _in_task
