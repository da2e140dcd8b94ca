"""Wait for what gives no event: another process, or a part that is asked from outside.

How soon it comes is no concern of a test, so the limit is the same for all, and nothing but the
end of a test that would wait for ever.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import Awaitable, Callable

_LOOK_S = 0.01
_LIMIT_S = 60.0
_LOOKS_ALIKE = 20


async def eventually(condition: Callable[[], object | Awaitable[object]]) -> None:
    """Look, letting others run, until the condition holds.

    Raises:
        AssertionError: it did not within a minute; names the condition.
    """
    limit = asyncio.timeout(_LIMIT_S)
    try:
        async with limit:
            while True:
                found = condition()
                if await found if inspect.isawaitable(found) else found:
                    return
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        if not limit.expired():
            raise
        raise _not_seen(condition) from None


async def settled(figure: Callable[[], int | Awaitable[int]]) -> int:
    """Look, letting others run, until a figure stays as it is; that.

    What is held up by somebody else's buffers gives no event; whoever is merely slow may be taken
    for it, so assert only what holds of both.
    """
    seen: deque[int] = deque(maxlen=_LOOKS_ALIKE)

    async def stays() -> bool:
        found = figure()
        seen.append(await found if inspect.isawaitable(found) else found)
        return seen.count(seen[0]) == _LOOKS_ALIKE

    await eventually(stays)
    return seen[0]


def eventually_blocking(condition: Callable[[], object]) -> None:
    """`eventually` for who has no event loop."""
    until_s = time.monotonic() + _LIMIT_S
    while not condition():
        if time.monotonic() >= until_s:
            raise _not_seen(condition)
        time.sleep(_LOOK_S)


def _not_seen(condition: Callable[[], object]) -> AssertionError:
    try:
        name = inspect.getsource(condition).strip()
    except (OSError, TypeError):  # a built-in, a partial
        name = repr(condition)
    return AssertionError(f"not within {_LIMIT_S:g} s: {name}")
