"""What orchestrators order: load, prefetch, unload; and the stream that tells how far a load is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from serverlessllm.agent.catalog import Catalog
from serverlessllm.agent.downloads import Downloads
from serverlessllm.agent.instances import Instances
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.waits import first
from serverlessllm.core.agentapi import HopTiming, LoadEvent, LoadRequest, UnloadRequest
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import InvalidRequest, SLLMError
from serverlessllm.core.failures import record_of
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.edge.server import Request
from serverlessllm.loader.progress import LoadProgress
from serverlessllm.loader.service import Loader

_NDJSON = (("content-type", "application/x-ndjson"), ("cache-control", "no-store"))
_encoder = msgspec.json.Encoder()


class Orders:
    """Carries orders out, and streams their progress."""

    def __init__(
        self,
        instances: Instances,
        downloads: Downloads,
        catalog: Catalog,
        loader: Loader,
        settings: AgentSettings,
        clock: Clock,
    ) -> None:
        self._instances = instances
        self._downloads = downloads
        self._catalog = catalog
        self._loader = loader
        self._settings = settings
        self._clock = clock

    async def load(self, request: Request, order: LoadRequest) -> None:
        """Answer with a line an event; the last one is `ready` or `failed`. The client's leaving
        gives the load up, unless others wait for it or it is `ready` already.

        Raises:
            SLLMError: it was refused before it began.
        """
        feed = _Feed()
        work = asyncio.ensure_future(self._carry_out(order, feed.put))
        try:
            await self._stream(request, work, feed)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def unload(self, order: UnloadRequest) -> int:
        """Stop the instances and drop copies; the bytes freed in this node's tiers."""
        await self._instances.unload(order.model, force=order.force)
        checkpoint = self._catalog.checkpoint(order.model)
        if checkpoint is None or order.cache_level <= CacheLevel.DRAM:
            return 0
        return await self._loader.evict(checkpoint.id, order.cache_level)

    async def _carry_out(
        self, order: LoadRequest, follow: Callable[[LoadEvent], None]
    ) -> LoadEvent:
        if order.instances < 1 or order.cache_level is CacheLevel.STORE:
            raise InvalidRequest("a load is for at least one instance, or for dram or nvme")
        await self._catalog.learn(order.spec, order.checkpoint)
        if order.cache_level is CacheLevel.DEVICE:
            ready = await self._instances.ensure_ready(order, follow)
            if not ready.arriving:
                return ready
            follow(ready)
            return await self._instances.until_whole(ready, follow)
        return await self._prefetch(order, follow)

    async def _prefetch(self, order: LoadRequest, follow: Callable[[LoadEvent], None]) -> LoadEvent:
        if order.checkpoint is None:
            raise InvalidRequest("only a checkpoint can be prefetched", param="checkpoint")

        def report(progress: LoadProgress) -> None:
            follow(
                LoadEvent(
                    state="loading",
                    stage=progress.hop,
                    bytes_done=progress.bytes_done,
                    bytes_total=progress.bytes_total,
                    eta_s=progress.eta_s,
                )
            )

        follow(LoadEvent(state="queued", stage="queue"))
        resident, waited_s = await self._downloads.load(
            order.checkpoint, order.cache_level, report, urgent=False
        )
        resident.release()
        return LoadEvent(
            state="ready", hops=(HopTiming(hop="queue", seconds=waited_s), *resident.hops)
        )

    async def _stream(self, request: Request, work: asyncio.Future[LoadEvent], feed: _Feed) -> None:
        settings = self._settings
        while not work.done():
            await first(work, feed.fresh.wait(), self._clock.sleep(settings.event_silence_s_max))
            if work.done():
                break
            for event in feed.take():
                await self._write(request, event)
            await first(work, feed.hurry.wait(), self._clock.sleep(settings.event_interval_s))
        if work.cancelled():
            raise asyncio.CancelledError
        error = work.exception()
        if error is None:
            await self._write(request, work.result())
        elif isinstance(error, SLLMError) and request.started:
            await self._write(request, LoadEvent(state="failed", error=record_of(error)))
        else:
            raise error
        request.finish()

    async def _write(self, request: Request, event: LoadEvent) -> None:
        if not request.started:
            request.start(200, _NDJSON)
        await request.write(_encoder.encode(event) + b"\n")


class _Feed:
    """The latest event of a load, after a `ready` that is still to be told; older ones that nobody
    has read are worth nothing."""

    def __init__(self) -> None:
        self.fresh = asyncio.Event()
        self.hurry = asyncio.Event()
        """There is a `ready`, which waits for no interval."""
        self._ready: LoadEvent | None = None
        self._event: LoadEvent | None = None

    def put(self, event: LoadEvent) -> None:
        if event.state == InstanceState.READY:
            self._ready = event
            self.hurry.set()
        else:
            self._event = event
        self.fresh.set()

    def take(self) -> tuple[LoadEvent, ...]:
        """What is to be told now."""
        self.fresh.clear()
        self.hurry.clear()
        ready, self._ready = self._ready, None
        return tuple(event for event in (ready, self._event) if event is not None)
