"""The slots of a model's ready instances, and the queue before them."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Protocol

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import ModelNotReady, TooManyRequests, Unavailable
from serverlessllm.core.ids import ModelId
from serverlessllm.scheduler.estimate import learn

_GAIN = 0.1
"""Weight of one more sample in the mean service time."""


class Watches(Protocol):
    """`serverlessllm.agent.owner.Owner`: wants to know what makes something due."""

    def became_idle(self, instance: Instance) -> None: ...

    def queued(self, slots: ModelSlots) -> None: ...


class _Waiter:
    __slots__ = ("given", "since_s")

    def __init__(self, since_s: float) -> None:
        self.given: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        self.since_s = since_s


class ModelSlots:
    """First come, first served; a request that is given a slot keeps it until its lease ends."""

    def __init__(
        self, model: ModelId, settings: AgentSettings, clock: Clock, owner: Watches
    ) -> None:
        self.model = model
        self.ready: list[Instance] = []
        self.service_s: float | None = None
        """Learned: mean time of one request."""
        self._settings = settings
        self.clock = clock
        self._owner = owner
        self._waiters: deque[_Waiter] = deque()

    @property
    def held(self) -> int:
        """Requests that run or wait."""
        return sum(instance.running for instance in self.ready) + len(self._waiters)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def lease(self, keep_alive_s: float | None) -> SlotLease:
        """`async with slots.lease(…) as instance`: one slot of a ready instance.

        Raises (on entering):
            ModelNotReady: there is no ready instance, or the last one went while waiting.
            TooManyRequests: too many wait already.
            Unavailable: it waited for too long.
        """
        return SlotLease(self, keep_alive_s)

    async def take(self) -> Instance:
        """A slot, counted as running; `give_back` returns it."""
        instance = None if self._waiters else self._free()
        if instance is not None:
            instance.running += 1
            return instance
        if not self.ready:
            raise ModelNotReady(f"{self.model} is not ready on this agent")
        slots = sum(instance.slots for instance in self.ready)
        if len(self._waiters) >= slots * self._settings.queue_factor:
            service_s = 1.0 if self.service_s is None else self.service_s
            raise TooManyRequests(
                f"{len(self._waiters)} requests wait for {self.model} already",
                retry_after_s=service_s * len(self._waiters) / slots,
            )
        waiter = _Waiter(self.clock.now_s())
        self._waiters.append(waiter)
        if len(self._waiters) == 1:
            self._owner.queued(self)
        try:
            return await waiter.given
        except asyncio.CancelledError:
            self._leave(waiter)
            raise

    def give_back(self, instance: Instance) -> None:
        """The slot is free: the first waiter's."""
        instance.running -= 1
        now_s = self.clock.now_s()
        instance.activity.moved_s = now_s
        self._serve()
        if instance.running == 0:
            instance.idle_s = now_s
            if instance.idle is not None and not instance.idle.done():
                instance.idle.set_result(None)
            self._owner.became_idle(instance)

    def add(self, instance: Instance) -> None:
        """It is ready."""
        self.ready.append(instance)
        self._serve()

    def remove(self, instance: Instance) -> None:
        """It takes no more requests. Without another one the waiters are sent elsewhere: nothing
        of theirs has run."""
        if instance in self.ready:
            self.ready.remove(instance)
        if not self.ready:
            for waiter in self._waiters:
                if not waiter.given.done():
                    waiter.given.set_exception(
                        ModelNotReady(f"the instance of {self.model} on this agent has gone")
                    )
            self._waiters.clear()

    def expire(self, now_s: float) -> float | None:
        """Refuse who has waited for too long; when the next one will have."""
        while self._waiters:
            waiter = self._waiters[0]
            due_s = waiter.since_s + self._settings.queue_wait_s_max
            if due_s > now_s:
                return due_s
            self._waiters.popleft()
            if not waiter.given.done():
                waiter.given.set_exception(
                    Unavailable(f"no slot of {self.model} was free in time", retry_after_s=1.0)
                )
        return None

    def learn(self, seconds: float) -> None:
        """A request was served in so much time."""
        self.service_s = learn(self.service_s, seconds, _GAIN)

    def _free(self) -> Instance | None:
        """The least busy instance with a free slot."""
        best = None
        for instance in self.ready:
            if instance.running < instance.slots and (
                best is None or instance.running < best.running
            ):
                best = instance
        return best

    def _serve(self) -> None:
        while self._waiters and (instance := self._free()) is not None:
            waiter = self._waiters.popleft()
            if not waiter.given.done():
                instance.running += 1
                waiter.given.set_result(instance)

    def _leave(self, waiter: _Waiter) -> None:
        """The client has gone: out of the queue, or give back what was given just now."""
        given = waiter.given
        if given.done() and not given.cancelled() and given.exception() is None:
            self.give_back(given.result())
        elif waiter in self._waiters:
            self._waiters.remove(waiter)


class SlotLease:
    """One request on one instance; the slot falls when the block is left."""

    __slots__ = ("_instance", "_keep_alive_s", "_slots", "_started_s")

    def __init__(self, slots: ModelSlots, keep_alive_s: float | None) -> None:
        self._slots = slots
        self._keep_alive_s = keep_alive_s
        self._instance: Instance | None = None
        self._started_s = 0.0

    async def __aenter__(self) -> Instance:
        slots = self._slots
        instance = self._instance = await slots.take()
        now_s = self._started_s = slots.clock.now_s()
        if instance.running == 1:
            instance.activity.moved_s = now_s
        if self._keep_alive_s is not None:
            instance.keep_alive_s = self._keep_alive_s
        return instance

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        instance = self._instance
        if instance is not None:
            slots = self._slots
            if kind is None:
                slots.learn(slots.clock.now_s() - self._started_s)
            slots.give_back(instance)
