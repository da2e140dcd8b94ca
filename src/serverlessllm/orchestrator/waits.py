"""Waiting with an end, on the injected clock."""

from __future__ import annotations

import asyncio
from typing import Any

from serverlessllm.core.clock import Clock


async def settled(clock: Clock, future: asyncio.Future[Any], timeout_s: float) -> bool:
    """Wait until `future` is done or the time is over; whether it is done.

    The future itself is never cancelled: others wait for it too.
    """
    if future.done() or timeout_s <= 0:
        return future.done()
    timer = asyncio.ensure_future(clock.sleep(timeout_s))
    try:
        await asyncio.wait((future, timer), return_when=asyncio.FIRST_COMPLETED)
    finally:
        timer.cancel()
    return future.done()
