"""One instance: what is known about it, and its passage through the lifecycle's table."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from serverlessllm.agent.reconcile import Ask
from serverlessllm.backends.base import Backend, LaunchPlan
from serverlessllm.backends.dialect import Dialect, dialect_of
from serverlessllm.core.agentapi import HopTiming, LoadEvent
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.ids import Address, CheckpointId, InstanceId, ModelId
from serverlessllm.core.lifecycle import InstanceState, advance, is_final
from serverlessllm.core.models import CheckpointRef, ModelSpec
from serverlessllm.telemetry.table import INSTANCES

if TYPE_CHECKING:
    from serverlessllm.backends.process import BackendProcess
    from serverlessllm.edge.upstream import Response

_GAPS_KEPT = 256


class Activity:
    """Signs of life of a busy instance, for the watchdog."""

    def __init__(self) -> None:
        self.answers: set[Response] = set()
        """Answers under way."""
        self.passed_bytes = 0
        """Of all answers together, at the last look."""
        self.ended = 0
        """Answers that are over."""
        self.ended_read = 0
        """Of those, the ones that its figures were read after."""
        self.progress: int | None = None
        """The engine's own count at the last reading."""
        self.read_s = 0.0
        """When its figures were last read."""
        self.moved_s = 0.0
        """When something last moved."""
        self.looked_s = 0.0
        """When it was last looked at."""
        self.proven_s = 0.0
        """When the engine last showed that it works without anything moving."""
        self.cpu_s: float | None = None
        """CPU time at the last look at a suspect."""
        self.gaps_s: deque[float] = deque(maxlen=_GAPS_KEPT)
        """Silences between two moves, as far as looks have seen them."""


class Instance:
    """State that its own task (`life.live`) advances; `slots.ModelSlots` counts its requests."""

    def __init__(
        self,
        instance: InstanceId,
        spec: ModelSpec,
        checkpoint: CheckpointRef | None,
        *,
        keep_alive_s: float,
        now_s: float,
        not_before_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.id = instance
        self.spec = spec
        self.checkpoint = checkpoint
        self.keep_alive_s = keep_alive_s
        self.state = InstanceState.QUEUED
        self.queued_s = now_s
        self.not_before_s = not_before_s
        """End of the pause after a crash."""
        loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[LoadEvent] = loop.create_future()
        """`ready`, or why not."""
        self.stopping: asyncio.Future[None] = loop.create_future()
        """Done when it shall drain and stop."""
        self.idle: asyncio.Future[None] | None = None
        """While it drains: done when its last request has ended."""
        self.event = LoadEvent(state=InstanceState.QUEUED, stage="queue")
        """How far it is, for those who wait."""
        self.followers: set[Callable[[LoadEvent], None]] = set()
        """Who is told of each new event; without any, a start that nobody needs is given up."""
        self.ask: Ask | None = None
        self.gate: asyncio.Future[None] | None = None
        """Done when the room asked for is given, or refused."""
        self.admitted = False
        self.holds_checkpoint = False
        """Whether its checkpoint is held in DRAM on its behalf."""
        self.memory_bytes = 0
        self.backend: Backend | None = None
        self.plan: LaunchPlan | None = None
        self.process: BackendProcess | None = None
        self.slots = 1
        self.running = 0
        self.ready_s = 0.0
        self.start_s: float | None = None
        """From its process's start to ready."""
        self.idle_s: float | None = None
        """Since when nobody uses it; None: it has not served a request."""
        self.kv_hit_rate = 0.0
        self.queue_s = 0.0
        """What it waited for its turn."""
        self.moved: tuple[HopTiming, ...] = ()
        """What moved for it; while its bytes still move, what has moved so far."""
        self.moving: LoadEvent | None = None
        """How far its bytes are, while they move."""
        self.arriving = False
        """Whether its process runs, but waits for bytes that still move."""
        self.load_failed = False
        """Whether its end is no fault of its process: the bytes did not come."""
        self.whole: asyncio.Future[LoadEvent] = loop.create_future()
        """`ready`, with the whole breakdown: both its process and its bytes are."""
        self.activity = Activity()
        self._on_change = on_change
        INSTANCES.inc(self.model, self.state)

    @property
    def model(self) -> ModelId:
        return self.spec.model

    @property
    def checkpoint_id(self) -> CheckpointId | None:
        return None if self.checkpoint is None else self.checkpoint.id

    @property
    def address(self) -> Address:
        """Where a ready instance is reached."""
        assert self.plan is not None
        return self.plan.address

    @functools.cached_property
    def dialect(self) -> Dialect:
        """How a ready instance is spoken to."""
        return dialect_of(self.backend, self.spec)

    @property
    def pending(self) -> bool:
        """Whether it is on its way to ready."""
        return self.state in {
            InstanceState.QUEUED,
            InstanceState.LOADING,
            InstanceState.STARTING,
        }

    @property
    def coming(self) -> bool:
        """Whether it is on its way to ready, and not given up."""
        return self.pending and not self.stopping.done()

    @property
    def usable(self) -> bool:
        """Whether it takes requests: ready, not about to stop, and its process lives."""
        return (
            self.state is InstanceState.READY
            and not self.stopping.done()
            and (self.process is None or not self.process.exited.done())
        )

    def advance(self, to: InstanceState) -> None:
        """Go on to `to`, and say so."""
        INSTANCES.inc(self.model, self.state, by=-1)
        self.state = advance(self.state, to)
        if not is_final(to):
            INSTANCES.inc(self.model, to)
        if self.pending:
            self.tell(self._at(to))
        self._on_change()

    def progressed(self, moving: LoadEvent) -> None:
        """Its bytes are so far."""
        self.moving = moving
        self.tell(self._at(self.state))

    def tell(self, event: LoadEvent) -> None:
        """Tell everybody who waits how far it is."""
        self.event = event
        for follower in tuple(self.followers):
            follower(event)

    def became_ready(self, now_s: float, started_s: float) -> None:
        """Its backend answers."""
        self.ready_s = self.activity.moved_s = now_s
        self.start_s = now_s - started_s
        self.advance(InstanceState.READY)
        if self.moving is not None:
            self.event = self._at(self.state)
        if not self.outcome.done():
            self.outcome.set_result(self.ready_event())

    def became_whole(self, moved: tuple[HopTiming, ...], now_s: float) -> None:
        """All its bytes are in DRAM, and held there on its behalf."""
        self.moved = moved
        self.moving = None
        self.holds_checkpoint = True
        self.arriving = False
        if self.pending:
            self.tell(self._at(self.state))
        if self.state is InstanceState.READY:
            self.touch(now_s)  # who was told to come back has its whole idle time for it
            self.whole.set_result(self.ready_event())
        self._on_change()

    def _at(self, state: InstanceState) -> LoadEvent:
        """On its way, or ready while its bytes still move: for who waits, that is loading."""
        if self.moving is None:
            return LoadEvent(state=state, stage="start" if state is InstanceState.STARTING else "")
        state = state if self.pending else InstanceState.LOADING
        return msgspec.structs.replace(self.moving, state=state)

    def ready_event(self) -> LoadEvent:
        """`ready`, with where the time went: what moved and the start overlap where an engine
        starts before its bytes are there."""
        assert self.start_s is not None
        hops = (
            HopTiming(hop="queue", seconds=self.queue_s),
            *self.moved,
            HopTiming(hop="start", seconds=self.start_s),
        )
        return LoadEvent(state="ready", instance=self.id, hops=hops, arriving=self.arriving)

    def touch(self, now_s: float) -> None:
        """Somebody was told that it is ready, and is about to use it."""
        if not self.running:
            self.ready_s, self.idle_s = now_s, None

    def ended(self, to: InstanceState, error: SLLMError | None) -> None:
        """Its life is over."""
        if not is_final(self.state):
            self.advance(to)
        for promise in (self.outcome, self.whole):
            if promise.done():
                continue
            if error is None:
                promise.cancel()
            else:
                promise.set_exception(error)
                promise.exception()  # whoever waits sees it; without waiters nobody must

    def stop(self) -> None:
        """Ask it to drain and stop; a request that runs is finished first. Idempotent."""
        if not self.stopping.done():
            self.stopping.set_result(None)
