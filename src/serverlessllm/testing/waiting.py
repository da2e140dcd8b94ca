"""Wait for what gives no event: another process, or a part that is asked from outside."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

_LOOK_S = 0.01


async def eventually(
    condition: Callable[[], object | Awaitable[object]], within_s: float = 5.0
) -> float:
    """Look, letting others run, until the condition holds; after how many seconds it was seen.

    Raises:
        AssertionError: it did not within `within_s`; names the condition.
    """
    began_s = time.monotonic()
    limit = asyncio.timeout(within_s)
    try:
        async with limit:
            while True:
                found = condition()
                if await found if inspect.isawaitable(found) else found:
                    return time.monotonic() - began_s
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        if not limit.expired():
            raise
        raise _not_seen(condition, within_s) from None


def eventually_blocking(condition: Callable[[], object], within_s: float = 5.0) -> float:
    """`eventually` for who has no event loop."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s >= within_s:
            raise _not_seen(condition, within_s)
        time.sleep(_LOOK_S)
    return time.monotonic() - began_s


def _not_seen(condition: Callable[[], object], within_s: float) -> AssertionError:
    try:
        name = inspect.getsource(condition).strip()
    except (OSError, TypeError):  # a built-in, a partial
        name = repr(condition)
    return AssertionError(f"not within {within_s:g} s: {name}")
