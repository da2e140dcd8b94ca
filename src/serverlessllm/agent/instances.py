"""All instances of an agent: found or made for who asks, remembered when they fail."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Collection, Iterable

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.life import Crashed, Host, live
from serverlessllm.agent.owner import DramTier, Owner
from serverlessllm.agent.reconcile import Crashes
from serverlessllm.agent.slots import ModelSlots
from serverlessllm.core.agentapi import LoadEvent, LoadRequest
from serverlessllm.core.errors import (
    BackendCrashLoop,
    Draining,
    LoadFailed,
    NoCapacity,
    SLLMError,
    TooManyRequests,
)
from serverlessllm.core.ids import InstanceId, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.telemetry import log
from serverlessllm.telemetry.table import INSTANCE_FAILURES

_log = log("agent")
_TRANSIENT = (NoCapacity, TooManyRequests, Draining)
"""Failures that say nothing of the next try."""
_NAME_CHARS_MAX = 80
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class _Model:
    """What the agent remembers of a model beyond its instances."""

    def __init__(self, slots: ModelSlots) -> None:
        self.slots = slots
        self.crashes = Crashes()
        self.failure: SLLMError | None = None
        self.failed_s = 0.0
        self.start_s: float | None = None

    def failed_lately(self, now_s: float, cache_s: float) -> SLLMError | None:
        """The failure that answers for the next load too."""
        return self.failure if now_s < self.failed_s + cache_s else None


class Instances:
    """Started and stopped on demand. `on_change` is called after each change of state."""

    def __init__(
        self,
        host: Host,
        *,
        memory_budget_bytes: int,
        dram: DramTier,
        on_change: Callable[[], None],
    ) -> None:
        self._host = host
        self._settings = host.settings
        self._clock = host.clock
        self._tell_change = on_change
        self._instances: dict[InstanceId, Instance] = {}
        self._models: dict[ModelId, _Model] = {}
        self._lives: dict[InstanceId, asyncio.Task[None]] = {}
        self._owner = Owner(
            host.settings,
            host.clock,
            instances=self._instances,
            memory_budget_bytes=memory_budget_bytes,
            dram=dram,
            stop=self._stop,
            give_up=self._give_up,
        )
        self._refusal: SLLMError | None = None

    def start(self) -> None:
        """Begin to decide."""
        self._owner.start()

    def stop_all(self) -> None:
        """Let every ready instance finish what it runs, and stop."""
        for instance in self.all():
            if instance.usable:
                self._stop(instance)

    async def close(self) -> None:
        """Stop every instance at once, and the owner."""
        self.refuse(Draining("this agent is shutting down", retry_after_s=1.0))
        for instance in self.all():
            self._give_up(instance, None)
        if self._lives:
            await asyncio.wait(self._lives.values())
        await self._owner.close()

    def refuse(self, error: SLLMError | None) -> None:
        """From now on, no load is taken, and those under way end with `error`; None: as before."""
        self._refusal = error
        if error is not None:
            for instance in tuple(self._instances.values()):
                if instance.coming:
                    self._give_up(instance, error)

    def all(self) -> tuple[Instance, ...]:
        """Every instance whose process or place is not gone yet."""
        return tuple(self._instances.values())

    def of(self, model: ModelId) -> tuple[Instance, ...]:
        """The instances of one model, the oldest first."""
        return tuple(each for each in self._instances.values() if each.model == model)

    def slots(self, model: ModelId) -> ModelSlots | None:
        """Where requests for the model get their slots; None: nobody ever asked to load it."""
        kept = self._models.get(model)
        return None if kept is None else kept.slots

    def expires_in_s(self, instance: Instance) -> float | None:
        """Idle time left of a ready instance; None: it stays."""
        return self._owner.expires_in_s(instance)

    def known(self) -> Iterable[tuple[ModelId, ModelSlots, float | None]]:
        """Models that were asked for here, with their queues and start-up times."""
        return [(model, kept.slots, kept.start_s) for model, kept in self._models.items()]

    def keep_only(self, registered: Collection[ModelId]) -> None:
        """Forget every other model, once it has no instance and no failure that still counts."""
        now_s, settings = self._clock.now_s(), self._settings
        here = {instance.model for instance in self._instances.values()}
        for name in self._models.keys() - here - set(registered):
            model = self._models[name]
            if model.failed_lately(now_s, settings.failure_cache_s) is None and (
                not model.crashes.recent(now_s, settings.crash_window_s)
            ):
                del self._models[name]

    async def ensure_ready(
        self, request: LoadRequest, follow: Callable[[LoadEvent], None]
    ) -> LoadEvent:
        """The `ready` event of an instance of the model, started if there is none.

        Concurrent calls share one start; it is given up when the last of them is cancelled.
        `follow` is told how far it is.

        Raises:
            SLLMError: why it cannot be had; the same for all that waited.
        """
        instance = self._find(request) or self._create(request)
        if request.keep_alive_s is not None:
            instance.keep_alive_s = request.keep_alive_s
        if instance.state is InstanceState.READY:
            instance.touch(self._clock.now_s())
            if instance.arriving:
                return instance.ready_event()
            return LoadEvent(state="ready", instance=instance.id)
        follow(instance.event)
        instance.followers.add(follow)
        try:
            await asyncio.wait({instance.outcome})
        finally:
            instance.followers.discard(follow)
            if instance.coming and not instance.followers and not instance.spec.min_replicas:
                self._give_up(instance, None)
        if instance.outcome.cancelled():
            raise LoadFailed(f"the load of {request.spec.model} was stopped", retry_after_s=1.0)
        return instance.outcome.result()

    async def until_whole(self, ready: LoadEvent, follow: Callable[[LoadEvent], None]) -> LoadEvent:
        """The `ready` event with the whole breakdown, once all bytes are there for the instance
        that `ready` told of. `follow` is told how far they are.

        Raises:
            SLLMError: why they will not be.
        """
        instance = None if ready.instance is None else self._instances.get(ready.instance)
        if instance is not None:
            follow(instance.event)
            instance.followers.add(follow)
            try:
                await asyncio.wait({instance.whole})
            finally:
                instance.followers.discard(follow)
            if not instance.whole.cancelled():
                return instance.whole.result()
        raise LoadFailed("the load was stopped", retry_after_s=1.0)

    async def unload(self, model: ModelId, *, force: bool) -> None:
        """Return when the model's instances have stopped; `force`: without their requests."""
        lives = [self._lives[instance.id] for instance in self.of(model)]
        for instance in self.of(model):
            if force or instance.pending:
                self._give_up(instance, LoadFailed(f"{model} was unloaded"))
            else:
                self._stop(instance)
        if lives:
            await asyncio.wait(lives)

    def died(self, instance: Instance) -> None:
        """Its process has ended: no request may be given to it any more, though its own task has
        yet to hear of it."""
        self._model(instance.model).slots.remove(instance)

    def kill(self, instance: Instance) -> None:
        """It hangs: end its process group; what follows is what follows a crash."""
        if instance.process is not None:
            instance.process.kill()

    # What happens to instances.

    def _find(self, request: LoadRequest) -> Instance | None:
        """The instance that serves this request's purpose, ready before pending."""
        wanted = None if request.checkpoint is None else request.checkpoint.id
        found: list[Instance] = []
        for instance in self.of(request.spec.model):
            if not (instance.coming or instance.usable):
                continue
            if instance.checkpoint_id == wanted:
                found.append(instance)
            elif instance.state is InstanceState.READY:
                self._stop(instance)  # the model has moved on to another checkpoint
        if len(found) < min(request.instances, request.spec.max_replicas):
            return None
        found.sort(key=lambda instance: instance.state is not InstanceState.READY)
        return found[0] if request.instances == 1 else found[-1]

    def _create(self, request: LoadRequest) -> Instance:
        settings, now_s = self._settings, self._clock.now_s()
        model = self._model(request.spec.model)
        self._check(request.spec.model, model, now_s)
        keep_alive_s = request.spec.keep_alive_s
        instance = Instance(
            _new_id(request.spec.model),
            request.spec,
            request.checkpoint,
            keep_alive_s=settings.keep_alive_s if keep_alive_s is None else keep_alive_s,
            now_s=now_s,
            not_before_s=model.crashes.restart_s(
                now_s, settings.crash_window_s, settings.restart_s_min, settings.restart_s_max
            ),
            on_change=self._changed,
        )
        self._instances[instance.id] = instance
        self._lives[instance.id] = asyncio.get_running_loop().create_task(
            self._live(instance), name=f"agent-instance-{instance.id}"
        )
        self._changed()
        return instance

    def _check(self, name: ModelId, model: _Model, now_s: float) -> None:
        """Raise why the model must not be started now."""
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)  # or it would keep every request's frames
        looping_s = model.crashes.looping_until_s(
            now_s, self._settings.crash_window_s, self._settings.crashes_max
        )
        if looping_s is not None:
            raise BackendCrashLoop(
                f"the backend of {name} crashed {self._settings.crashes_max} times within "
                f"{self._settings.crash_window_s:g} s; the agent's log has its last lines",
                retry_after_s=looping_s - now_s,
            )
        failure = model.failed_lately(now_s, self._settings.failure_cache_s)
        if failure is not None:
            raise failure.with_traceback(None)

    async def _live(self, instance: Instance) -> None:
        """The instance's task: its life, and what its end means for the model."""
        model = self._model(instance.model)
        to, error = InstanceState.STOPPED, None
        try:
            await live(instance, self._host, self._owner.get_room)
        except SLLMError as failure:
            to, error = InstanceState.FAILED, failure
        except asyncio.CancelledError:
            if instance.state is InstanceState.READY:
                instance.advance(InstanceState.DRAINING)
        except Exception:  # noqa: BLE001 - boundary of an instance's task: a bug ends only this one
            _log.error("instance failed unexpectedly", instance=instance.id, exc_info=True)
            to, error = InstanceState.FAILED, LoadFailed("internal error of the agent")
        self._ended(model, instance, to, error)

    def _ended(
        self, model: _Model, instance: Instance, to: InstanceState, error: SLLMError | None
    ) -> None:
        now_s = self._clock.now_s()
        if error is not None:
            INSTANCE_FAILURES.inc(instance.model, error.code)
            _log.warning("instance failed", instance=instance.id, code=error.code)
            fault = instance.process is not None and not instance.load_failed
            if fault and (isinstance(error, Crashed) or not instance.ready_s):
                model.crashes = model.crashes.more(now_s, self._settings.crash_window_s)
            if not isinstance(error, (Crashed, *_TRANSIENT)):
                model.failure, model.failed_s = error, now_s
        del self._instances[instance.id], self._lives[instance.id]
        model.slots.remove(instance)
        instance.ended(to, error)
        self._changed()

    def _give_up(self, instance: Instance, error: SLLMError | None) -> None:
        """End it now, whatever it does; who waits for it gets `error`."""
        self._model(instance.model).slots.remove(instance)
        if error is not None and not instance.outcome.done():
            instance.outcome.set_exception(error)
            instance.outcome.exception()
        instance.stop()
        life = self._lives[instance.id]
        if not life.cancelling():  # a second one would interrupt its cleaning up
            life.cancel()

    def _stop(self, instance: Instance) -> None:
        """Let it finish what runs, and stop."""
        self._model(instance.model).slots.remove(instance)
        instance.stop()

    def _changed(self) -> None:
        """Something changed: count, tell, and decide again."""
        for instance in self._instances.values():
            if instance.usable:
                slots = self._model(instance.model).slots
                if instance not in slots.ready:
                    self._became_ready(instance, slots)
        self._owner.wake()
        self._tell_change()

    def _became_ready(self, instance: Instance, slots: ModelSlots) -> None:
        model = self._model(instance.model)
        model.start_s = instance.start_s
        model.failure = None
        slots.add(instance)

    def _model(self, model: ModelId) -> _Model:
        kept = self._models.get(model)
        if kept is None:
            slots = ModelSlots(model, self._settings, self._clock, self._owner)
            kept = self._models[model] = _Model(slots)
        return kept


def _new_id(model: ModelId) -> InstanceId:
    """Readable, unique, and short enough for a file's name."""
    return InstanceId(f"{_UNSAFE.sub('-', model)[:_NAME_CHARS_MAX]}-{secrets.token_hex(4)}")
