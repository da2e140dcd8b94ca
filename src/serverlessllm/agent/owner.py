"""The one task that gives room and takes it away: facts in, `reconcile`, actions out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.reconcile import (
    Admit,
    Ask,
    Facts,
    Limits,
    Refuse,
    Room,
    Stop,
    expires_s,
    reconcile,
)
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.agent.slots import ModelSlots
from serverlessllm.backends.waits import first
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import TierUsage
from serverlessllm.core.errors import LoadFailed, NoCapacity, OutOfSpace, SLLMError
from serverlessllm.core.ids import CheckpointId, InstanceId, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.units import format_size
from serverlessllm.telemetry import log
from serverlessllm.telemetry.guard import keep_running

_log = log("agent")


class DramTier(Protocol):
    """`serverlessllm.agent.catalog.Catalog`: what is held in DRAM, by whomever."""

    def dram(self) -> TierUsage: ...

    def pinned(self, checkpoint: CheckpointId) -> bool:
        """Whether it stays in DRAM with or without an instance."""
        ...


class Owner:
    """Decides whenever something that matters has changed, and when something is due."""

    def __init__(
        self,
        settings: AgentSettings,
        clock: Clock,
        *,
        instances: Mapping[InstanceId, Instance],
        memory_budget_bytes: int,
        dram: DramTier,
        stop: Callable[[Instance], None],
        give_up: Callable[[Instance, SLLMError | None], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._instances = instances
        self._memory_budget_bytes = memory_budget_bytes
        self._dram = dram
        self._stop = stop
        self._give_up = give_up
        self._limits = Limits(
            first_use_s=settings.first_use_s, room_wait_s_max=settings.room_wait_s_max
        )
        self._queues: dict[ModelId, ModelSlots] = {}
        self._wake = asyncio.Event()
        self._next_s: float | None = None
        self._asking = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to decide."""
        restart_s = self._settings.task_restart_s
        kept = keep_running("owner", self._own, out=_log, clock=self._clock, restart_s=restart_s)
        self._task = asyncio.create_task(kept, name="agent-owner")

    async def close(self) -> None:
        """Decide no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def wake(self) -> None:
        """Something changed."""
        self._wake.set()

    def became_idle(self, instance: Instance) -> None:
        """Its last request has ended. Looked at now only if somebody waits for room, or nothing
        is due before it is: a busy agent must not decide anew with every request."""
        idle_s = 0.0 if instance.idle_s is None else instance.idle_s
        expiry_s = idle_s + instance.keep_alive_s
        due = self._next_s is None or expiry_s < self._next_s
        if self._asking or (due and instance.keep_alive_s >= 0):
            self._wake.set()

    def queued(self, slots: ModelSlots) -> None:
        """A request began to wait there: it must not wait for ever."""
        self._queues[slots.model] = slots
        self._wake.set()

    async def get_room(self, instance: Instance, memory_bytes: int) -> None:
        """Wait until the instance has room: at first for its checkpoint, then for its process.

        Raises:
            NoCapacity: there is none, and none will be soon.
            OutOfSpace: the checkpoint is larger than the DRAM tier.
        """
        first = not instance.admitted
        checkpoint = instance.checkpoint if first else None
        instance.gate = asyncio.get_running_loop().create_future()
        instance.ask = Ask(
            instance=instance.id,
            memory_bytes=memory_bytes,
            checkpoint=None if checkpoint is None else checkpoint.id,
            checkpoint_bytes=0 if checkpoint is None else self._dram_bytes(instance),
            instances=int(first),
            since_s=self._clock.now_s(),
            not_before_s=instance.not_before_s,
        )
        self._asking += 1
        self._wake.set()
        try:
            await instance.gate
        finally:
            self._asking -= 1
            instance.ask = None

    async def _own(self) -> None:
        while True:
            self._wake.clear()
            self._next_s = self._decide()
            await first(self._wake.wait(), self._sleep_until(self._next_s))

    async def _sleep_until(self, at_s: float | None) -> None:
        if at_s is None:
            await asyncio.get_running_loop().create_future()
        else:
            await self._clock.sleep(max(0.0, at_s - self._clock.now_s()))

    def _decide(self) -> float | None:
        """Act on all that is due; when to look again."""
        now_s = self._clock.now_s()
        due = [*self._expire_waiters(now_s), *self._expire_starts(now_s)]
        kept = self._kept()
        asks = [each.ask for each in self._instances.values() if each.ask is not None]
        plan = reconcile(
            [
                self._facts(each, kept=each.id in kept)
                for each in self._instances.values()
                if each.admitted
            ],
            asks,
            self._budget() if asks else Room(),
            self._limits,
            now_s,
        )
        for action in plan.actions:
            self._act(self._instances[action.instance], action)
        if plan.next_s is not None:
            due.append(plan.next_s)
        return min(due, default=None)

    def _expire_waiters(self, now_s: float) -> list[float]:
        """Refuse requests that waited for too long for a slot."""
        due: list[float] = []
        for model, slots in tuple(self._queues.items()):
            next_s = slots.expire(now_s)
            if next_s is None:
                del self._queues[model]
            else:
                due.append(next_s)
        return due

    def _expire_starts(self, now_s: float) -> list[float]:
        """End loads that take longer than any may."""
        due: list[float] = []
        for instance in tuple(self._instances.values()):
            if instance.pending or instance.arriving:
                at_s = instance.queued_s + self._settings.load_s_max
                if at_s <= now_s:
                    took = f"{self._settings.load_s_max:g} s"
                    self._give_up(
                        instance, LoadFailed(f"{instance.model} took over {took} to load")
                    )
                else:
                    due.append(at_s)
        return due

    def _budget(self) -> Room:
        """Of DRAM: what neither others of this machine nor pins hold."""
        usage = self._dram.dram()
        own = {
            each.checkpoint_id: self._dram_bytes(each)
            for each in self._instances.values()
            if each.holds_checkpoint
        }
        others_bytes = max(0, usage.pinned_bytes - sum(own.values()))
        return Room(
            memory_bytes=self._memory_budget_bytes,
            dram_bytes=usage.budget_bytes - others_bytes,
            instances=self._settings.instances_max,
        )

    def _dram_bytes(self, instance: Instance) -> int:
        """What the instance's checkpoint takes of DRAM because of its instances."""
        checkpoint = instance.checkpoint
        if checkpoint is None or self._dram.pinned(checkpoint.id):
            return 0
        return checkpoint.size_bytes

    def expires_in_s(self, instance: Instance) -> float | None:
        """Idle time left of a ready instance (all of it while it is busy); None: it stays."""
        facts = self._facts(instance, kept=instance.id in self._kept())
        if facts.kept or facts.keep_alive_s < 0 or facts.state is not InstanceState.READY:
            return None
        at_s = expires_s(facts, self._limits)
        return facts.keep_alive_s if at_s is None else max(0.0, at_s - self._clock.now_s())

    def _kept(self) -> set[InstanceId]:
        """The instances that the operator wants in any case: the oldest of each model."""
        kept: set[InstanceId] = set()
        counts: Counter[ModelId] = Counter()
        for instance in self._instances.values():
            if instance.usable and counts[instance.model] < instance.spec.min_replicas:
                counts[instance.model] += 1
                kept.add(instance.id)
        return kept

    def _facts(self, instance: Instance, *, kept: bool) -> Facts:
        return Facts(
            instance=instance.id,
            model=instance.model,
            state=instance.state if instance.pending or instance.usable else InstanceState.DRAINING,
            memory_bytes=instance.memory_bytes,
            checkpoint=instance.checkpoint_id,
            checkpoint_bytes=self._dram_bytes(instance),
            held=instance.running,
            ready_s=instance.ready_s,
            idle_s=instance.idle_s,
            keep_alive_s=instance.keep_alive_s,
            kept=kept or instance.arriving,
        )

    def _act(self, instance: Instance, action: Admit | Stop | Refuse) -> None:
        if isinstance(action, Stop):
            _log.info("instance stops", instance=instance.id, why=action.why)
            self._stop(instance)
            return
        gate, ask = instance.gate, instance.ask
        if gate is None or ask is None or gate.done():
            return
        instance.ask = None
        if isinstance(action, Admit):
            instance.admitted = True
            instance.memory_bytes += ask.memory_bytes
            gate.set_result(None)
        else:
            gate.set_exception(_no_room(instance, ask, ever=action.ever))


def _no_room(instance: Instance, ask: Ask, *, ever: bool) -> SLLMError:
    """Why: the DRAM tier is too small, memory is, or everything is in use."""
    if ask.checkpoint is not None:
        what, setting = f"{format_size(ask.checkpoint_bytes)} of DRAM", "loader.dram_budget_bytes"
    else:
        what, setting = f"{format_size(ask.memory_bytes)} of memory", "agent.memory_budget_bytes"
    if not ever:
        return NoCapacity(
            f"{instance.model} needs {what}, and every instance on this agent is in use",
            retry_after_s=2.0,
        )
    message = f"{instance.model} needs {what}: more than this agent may use; raise {setting}"
    return NoCapacity(message) if ask.checkpoint is None else OutOfSpace(message)
