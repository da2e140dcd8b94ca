"""Waiting for whichever comes first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def first(*awaited: asyncio.Future[Any] | Coroutine[Any, Any, Any]) -> None:
    """Return when one of them is done. Coroutines are then cancelled, and over when this returns;
    futures stay as they are. What it came to, the caller asks the futures."""
    tasks = [asyncio.ensure_future(each) for each in awaited if asyncio.iscoroutine(each)]
    futures = [each for each in awaited if isinstance(each, asyncio.Future)]
    try:
        await asyncio.wait([*tasks, *futures], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def readable(descriptor: int) -> None:
    """Return when a read from it would not block: there is something, or its end."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_reader(descriptor, told.set)
    try:
        await told.wait()
    finally:
        loop.remove_reader(descriptor)
