"""Work that is waited for: threads that a cancelled caller does not abandon, groups of tasks
that fail with one error, disks that fail in the words of the error contract."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from serverlessllm.core.errors import LoadFailed
from serverlessllm.core.failures import single_error
from serverlessllm.loader.tiers.staging import Staging

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A few threads. A call that has begun is always waited for, even by a cancelled caller: it
    works on descriptors and memory that the caller is about to give back."""

    def __init__(self, count: int, name: str) -> None:
        self.staging = Staging(count)
        """A block for each thread."""
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `call`."""
        return await self.run_or_undo(_keep, call, *args, **kwargs)

    async def run_or_undo(
        self, undo: Callable[[T], object], call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The result of `call`, which `undo` takes back if the caller is cancelled meanwhile."""
        work = self._pool.submit(call, *args, **kwargs)
        done = asyncio.wrap_future(work)
        try:
            await asyncio.wait((done,))
        except asyncio.CancelledError:
            if not work.cancel():
                await outlast(done)
                if done.exception() is None:
                    undo(done.result())
            raise
        return done.result()

    @contextlib.asynccontextmanager
    async def leaving(self) -> AsyncIterator[contextlib.ExitStack]:
        """A stack of things to close, closed in a thread: to unmap a GiB takes 60 ms."""
        stack = contextlib.ExitStack()
        try:
            yield stack
        finally:
            await finish(self.run(stack.close))

    def close(self) -> None:
        """Nothing may be running."""
        self._pool.shutdown()


async def outlast(work: asyncio.Future[Any]) -> None:
    """Wait for the end of `work` however often this task is cancelled: for short work only."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((work,))


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run a clean-up to its end although this task may be cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    await outlast(task)
    return task.result()


async def for_each(items: Iterable[T], width: int, work: Callable[[T], Awaitable[None]]) -> None:
    """`work` on every item, begun in order, at most `width` at once; the first error ends it."""
    waiting = iter(items)

    async def worker() -> None:
        for item in waiting:
            await work(item)

    with single_error():
        async with asyncio.TaskGroup() as group:
            for _ in range(width):
                group.create_task(worker())


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """What the file system says, in the words of the error contract."""
    try:
        yield
    except OSError as error:
        raise LoadFailed(
            f"a tier of the agent failed ({os.strerror(error.errno or 0)}): see its disk",
            retry_after_s=5.0,
        ) from error


def _keep(_result: object) -> None:
    """Nothing to take back."""
