"""The waiting room: requests for a model that is not ready wait here for the one load of it.

One task a model owns the whole way from nothing to ready; requests come and go beside it. The
load ends early only when nobody wants it any more: no waiter, no promise to one that was sent
away with `model_loading`, no operator who asked for it, no minimum of replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import msgspec

from serverlessllm.core.agentapi import HopTiming, LoadEvent
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import SLLMError, TooManyRequests, Unavailable
from serverlessllm.core.failures import record_of
from serverlessllm.core.ids import AgentId, Epoch, ModelId
from serverlessllm.orchestrator.listeners import Listeners
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.waits import settled
from serverlessllm.telemetry.logs import log

_log = log("orchestrator")

Fleet = frozenset[tuple[AgentId, Epoch]]
"""Agents and their registrations; a restarted agent makes another fleet."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A finished load, and where its time went."""

    agent: AgentId
    predicted_s: float
    """By the scheduler, from the choice to ready."""
    place_s: float = 0.0
    ingest_s: float = 0.0
    load_s: float = 0.0
    """From the choice to ready, in fact."""
    hops: tuple[HopTiming, ...] = ()


class BringsUp(Protocol):
    """`serverlessllm.orchestrator.loads.Loads`: the work itself, without the room."""

    async def bring_up(
        self,
        model: ModelId,
        elsewhere: bool,
        publish: Callable[[LoadEvent], None],
        became_ready: Callable[[Loaded], None],
    ) -> Loaded:
        """Make `model` ready on some agent; `elsewhere`: on one where it is not ready yet.

        `became_ready` is told of an instance that serves before its bytes are all there; the
        result, with the whole breakdown, comes when they are.
        """
        ...

    def fleet(self) -> Fleet: ...


class _Failure(msgspec.Struct, frozen=True):
    error: SLLMError
    until_s: float
    fleet: Fleet


class _Loading:
    """One load under way and who wants it."""

    __slots__ = ("done", "elsewhere", "held", "progress", "task", "turn", "waiters")

    def __init__(self, loop: asyncio.AbstractEventLoop, elsewhere: bool) -> None:
        self.elsewhere = elsewhere
        self.task: asyncio.Task[None] | None = None
        self.done: asyncio.Future[Loaded] = loop.create_future()
        self.turn: asyncio.Future[None] = loop.create_future()
        """Done at the next progress; then another one takes its place."""
        self.progress = LoadEvent(state="queued")
        self.waiters = 0
        self.held = False
        """Goes on without waiters."""

    def publish(self, event: LoadEvent) -> None:
        self.progress = event
        turn, self.turn = self.turn, self.turn.get_loop().create_future()
        if not turn.done():
            turn.set_result(None)

    def fail(self, error: SLLMError) -> None:
        """Unless it has an outcome already."""
        if self.done.done():
            return
        self.done.set_exception(error)
        self.done.exception()  # seen: it may be that nobody waits
        self.publish(LoadEvent(state="failed", error=record_of(error)))


class Waiter:
    """A request's place in the room."""

    __slots__ = ("_clock", "_loading")

    def __init__(self, loading: _Loading, clock: Clock) -> None:
        self._loading = loading
        self._clock = clock

    @property
    def progress(self) -> LoadEvent:
        """The latest."""
        return self._loading.progress

    @property
    def done(self) -> asyncio.Future[Loaded]:
        """The load's outcome, not to be cancelled; an error is the same for every waiter."""
        return self._loading.done

    @property
    def incomplete(self) -> bool:
        """Whether the load goes on: there is no instance, or its bytes are not all there."""
        done, task = self._loading.done, self._loading.task
        return not done.done() or (task is not None and not task.done())

    def loaded(self) -> Loaded:
        """What `done` came to.

        Raises:
            SLLMError: why the load failed; the same for every waiter.
        """
        error = self._loading.done.exception()
        if error is not None:
            raise error.with_traceback(None)
        return self._loading.done.result()

    async def ready(self, timeout_s: float) -> Loaded | None:
        """The load's outcome, or None when it has none after `timeout_s`.

        Raises:
            SLLMError: why the load failed; the same for every waiter.
        """
        return self.loaded() if await settled(self._clock, self.done, timeout_s) else None

    async def progressed(self, timeout_s: float) -> LoadEvent:
        """The next progress, or the same one again after `timeout_s` or at the end."""
        done, turn = self._loading.done, self._loading.turn
        if not done.done() and not turn.done():
            timer = asyncio.ensure_future(self._clock.sleep(timeout_s))
            try:
                await asyncio.wait((done, turn, timer), return_when=asyncio.FIRST_COMPLETED)
            finally:
                timer.cancel()
        return self._loading.progress

    async def moved(self) -> None:
        """Return at the next progress, also of an instance that is ready before its bytes, or when
        the load has ended."""
        task = self._loading.task
        if task is not None and self.incomplete:
            await asyncio.wait((self._loading.turn, task), return_when=asyncio.FIRST_COMPLETED)

    def promise(self) -> None:
        """The client is told to come back: the load goes on for it."""
        self._loading.held = True


class WaitingRoom:
    """Single flight a model in this process. Owns its tasks; `close` ends them."""

    def __init__(self, loads: BringsUp, settings: OrchestratorSettings, clock: Clock) -> None:
        self._loads = loads
        self._settings = settings
        self._clock = clock
        self.listeners = Listeners()
        self._loadings: dict[ModelId, _Loading] = {}
        self._arriving: dict[ModelId, _Loading] = {}
        """Loads whose instance takes requests although its bytes still move."""
        self._failures: dict[tuple[ModelId, bool], _Failure] = {}
        """By model and `elsewhere`: no room for a second replica says nothing of the first."""
        self._last_loads: dict[ModelId, Loaded] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._began: asyncio.Future[None] | None = None
        """Done when the next load begins, if somebody asked."""
        self._waiting = 0
        self._closed = False

    @property
    def waiting(self) -> int:
        """Requests in the room."""
        return self._waiting

    @property
    def loading(self) -> int:
        """Loads under way."""
        return len(self._loadings) + len(self._arriving)

    @contextmanager
    def enter(self, model: ModelId, *, elsewhere: bool = False) -> Iterator[Waiter]:
        """Wait for `model`, starting its load if there is none; leaving is always safe. A load
        whose instance is ready before its bytes is entered too: nobody waits, but may look on.

        Raises:
            TooManyRequests: the room is full.
            SLLMError: a load failed moments ago.
        """
        loading = self._under_way(model, elsewhere)
        waiting = 0 if loading is None else loading.waiters
        if waiting >= self._settings.waiters_per_model_max or (
            self._waiting >= self._settings.waiters_max
        ):
            raise TooManyRequests(
                f"too many requests wait for {model} to load; try again shortly",
                retry_after_s=self._retry_after_s(loading),
            )
        if loading is None:
            loading = self._start(model, elsewhere)
        loading.waiters += 1
        self._waiting += 1
        try:
            yield Waiter(loading, self._clock)
        finally:
            loading.waiters -= 1
            self._waiting -= 1
            self._drop_if_unwanted(model, loading)

    def hold(self, model: ModelId, *, elsewhere: bool = False) -> bool:
        """Have `model` loaded without waiting for it; whether a load is under way now."""
        try:
            loading = self._under_way(model, elsewhere) or self._start(model, elsewhere)
        except SLLMError:
            return False
        loading.held = True
        return True

    def release(self, model: ModelId) -> None:
        """Nobody but its waiters wants the load any more."""
        loading = self._loadings.get(model)
        if loading is not None:
            loading.held = False
            self._drop_if_unwanted(model, loading)

    def not_ready(self, model: ModelId, agent: AgentId) -> None:
        """A request found that the instance whose bytes still moved is gone."""
        loading = self._arriving.get(model)
        if loading is not None and loading.done.result().agent == agent:
            del self._arriving[model]

    def under_way(self, model: ModelId) -> tuple[LoadEvent | None, asyncio.Future[None]]:
        """How far the load of `model` is (None: there is none); and what is done at its next
        progress, or when any load begins. Not to be cancelled."""
        loading = self._under_way(model, elsewhere=False)
        if loading is not None:
            return loading.progress, loading.turn
        if self._began is None or self._began.done():
            self._began = asyncio.get_running_loop().create_future()
        return None, self._began

    def progress_of(self, model: ModelId) -> LoadEvent | None:
        """How far the load of `model` is; None: there is none."""
        loading = self._under_way(model, elsewhere=False)
        return None if loading is None else loading.progress

    def failure_of(self, model: ModelId) -> SLLMError | None:
        """Why its load failed, if that answers for the next one."""
        failure = self._recent_failure(model, elsewhere=False)
        return None if failure is None else failure.error

    def last_load(self, model: ModelId) -> Loaded | None:
        """The latest load that ended well."""
        return self._last_loads.get(model)

    def waiting_for(self) -> dict[ModelId, int]:
        """Requests in the room, by model."""
        return {model: loading.waiters for model, loading in self._loadings.items()}

    def stop(self, model: ModelId) -> None:
        """End the load of a model that is being deleted; its waiters get the cancellation."""
        for loads in (self._loadings, self._arriving):
            loading = loads.get(model)
            if loading is not None and loading.task is not None:
                loading.task.cancel()

    def forget(self, model: ModelId) -> None:
        """An operator changed something: what happened before says nothing any more."""
        self._failures.pop((model, False), None)
        self._failures.pop((model, True), None)
        self._last_loads.pop(model, None)

    async def close(self) -> None:
        """End every load; waiters are told that it was cancelled."""
        self._closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _under_way(self, model: ModelId, elsewhere: bool) -> _Loading | None:
        """The load that serves, if there is one."""
        arriving = self._arriving.get(model)
        if arriving is not None and elsewhere and not arriving.elsewhere:
            arriving = None
        return self._loadings.get(model) or arriving

    def _start(self, model: ModelId, elsewhere: bool) -> _Loading:
        failure = self._recent_failure(model, elsewhere)
        if failure is not None:
            raise failure.error.with_traceback(None)
        if self._closed or self.loading >= self._settings.loads_max:
            raise TooManyRequests(
                "too many models are loading at once; try again shortly", retry_after_s=1.0
            )
        loading = _Loading(asyncio.get_running_loop(), elsewhere)
        self._loadings[model] = loading
        if self._began is not None and not self._began.done():
            self._began.set_result(None)
        task = asyncio.ensure_future(self._own(model, loading))
        loading.task = task
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, model, loading))
        return loading

    async def _own(self, model: ModelId, loading: _Loading) -> None:
        """The task that owns one load: its outcome is given to all waiters exactly once."""
        try:
            became_ready = partial(self._became_ready, model, loading)
            loaded = await self._loads.bring_up(
                model, loading.elsewhere, loading.publish, became_ready
            )
        except SLLMError as failure:
            self._fail(model, loading, failure)
        except Exception:  # noqa: BLE001 - boundary of a task: its waiters must hear of a bug
            _log.error("load ended by a bug", exc_info=True, model=model)
            self._fail(model, loading, SLLMError())
        else:
            self._became_ready(model, loading, loaded)

    def _became_ready(self, model: ModelId, loading: _Loading, loaded: Loaded) -> None:
        """The load's outcome; told once more when the bytes of an instance that was ready before
        them are there, it completes what is remembered of it."""
        first = not loading.done.done()
        if not first and model not in self._last_loads:  # deleted meanwhile
            return
        self._last_loads.pop(model, None)
        self._last_loads[model] = loaded
        while len(self._last_loads) > self._settings.models_list_max:
            del self._last_loads[next(iter(self._last_loads))]
        if first:
            loading.done.set_result(loaded)
            loading.publish(LoadEvent(state="ready", hops=loaded.hops))
            if self._loadings.get(model) is loading:
                self._arriving[model] = self._loadings.pop(model)

    def _fail(self, model: ModelId, loading: _Loading, error: SLLMError) -> None:
        self._remember((model, loading.elsewhere), error)
        loading.fail(error)

    def _ended(self, model: ModelId, loading: _Loading, task: asyncio.Task[None]) -> None:
        """However the owner ended, even before its first step: nobody may wait for ever."""
        self._tasks.discard(task)
        for loads in (self._loadings, self._arriving):
            if loads.get(model) is loading:
                del loads[model]
        loading.fail(Unavailable(f"the load of {model} was cancelled", retry_after_s=1.0))

    def _drop_if_unwanted(self, model: ModelId, loading: _Loading) -> None:
        if loading.waiters or loading.held or loading.done.done():
            return
        if self._loadings.get(model) is loading:
            del self._loadings[model]  # the next request starts afresh
        if loading.task is not None:
            loading.task.cancel()

    def _remember(self, load: tuple[ModelId, bool], error: SLLMError) -> None:
        now_s = self._clock.now_s()
        for old in [key for key, failure in self._failures.items() if failure.until_s <= now_s]:
            del self._failures[old]
        self._failures[load] = _Failure(
            error, now_s + self._settings.failure_cache_s, self._loads.fleet()
        )

    def _recent_failure(self, model: ModelId, elsewhere: bool) -> _Failure | None:
        """From the negative cache, unless agents came or went since."""
        failure = self._failures.get((model, elsewhere))
        if failure is not None and (
            failure.until_s <= self._clock.now_s() or failure.fleet != self._loads.fleet()
        ):
            del self._failures[model, elsewhere]
            return None
        return failure

    @staticmethod
    def _retry_after_s(loading: _Loading | None) -> float:
        eta_s = loading.progress.eta_s if loading is not None else None
        return 1.0 if eta_s is None else min(max(1.0, eta_s), 120.0)
