"""From nothing to ready: checkpoint, choice of an agent, load; the next-best agent on refusal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import msgspec

from serverlessllm.core.agentapi import LoadEvent, LoadRequest
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel, JobRecord, JobStage
from serverlessllm.core.errors import (
    BackendDied,
    ModelNotFound,
    NoCapacity,
    OutOfSpace,
    SLLMError,
)
from serverlessllm.core.ids import Address, AgentId, Epoch, ModelId, is_hub_name
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.core.units import format_size
from serverlessllm.orchestrator.coldstart import Fleet, Loaded
from serverlessllm.orchestrator.seams import Ingests
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView, names_like, ready_agents
from serverlessllm.telemetry.spans import span
from serverlessllm.telemetry.table import SCHEDULE_DECISIONS, SCHEDULE_ERROR_SECONDS


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """Where a load should go."""

    agent: AgentId
    epoch: Epoch
    address: Address
    cache_level: CacheLevel
    """Where the model's bytes lay there when it was chosen."""
    predicted_s: float


class Places(Protocol):
    """`serverlessllm.orchestrator.router.Router`: the scheduler on the view."""

    def place(self, record: ModelRecord, avoid: Collection[AgentId]) -> Placed | None:
        """The best agent for a load; None when none may be asked."""
        ...


class AsksAgents(Protocol):
    """`serverlessllm.orchestrator.agents.AgentClient`."""

    async def load(
        self, address: Address, request: LoadRequest, publish: Callable[[LoadEvent], None]
    ) -> LoadEvent:
        """The last `ready` event; each one before it is published, among them those of an instance
        whose bytes still move (`arriving`). Cancelling hangs up.

        Raises:
            AgentLost: it cannot be reached, or hung up before the end.
            SLLMError: its refusal, or why the load failed.
        """
        ...


class AgentLost(BackendDied):
    """The agent did not answer, or hung up: another one, or its next life, may."""


def fleet_of(view: ClusterView) -> Fleet:
    """The agents that a load may meet."""
    return frozenset((seen.agent, seen.record.epoch) for seen in view.agents.values())


class Loads:
    """What the waiting room has done; holds nothing between two calls."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        view: ClusterView,
        places: Places,
        agents: AsksAgents,
        ingestion: Ingests,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._view = view
        self._places = places
        self._agents = agents
        self._ingestion = ingestion
        self._clock = clock

    def fleet(self) -> Fleet:
        return fleet_of(self._view)

    async def bring_up(
        self,
        model: ModelId,
        elsewhere: bool,
        publish: Callable[[LoadEvent], None],
        became_ready: Callable[[Loaded], None],
    ) -> Loaded:
        with span("orchestrator.load", loud=True, model=model, elsewhere=elsewhere) as stage:
            loaded = await self._bring_up(model, elsewhere, publish, became_ready)
            stage.note(agent=loaded.agent, predicted_s=round(loaded.predicted_s, 3))
        return loaded

    async def _bring_up(
        self,
        model: ModelId,
        elsewhere: bool,
        publish: Callable[[LoadEvent], None],
        became_ready: Callable[[Loaded], None],
    ) -> Loaded:
        started_s = self._clock.now_s()
        record = await self.checkpointed(model, publish)
        ingest_s = self._clock.now_s() - started_s
        self._check_fits(record)
        avoid = ready_agents(self._view, model) if elsewhere else frozenset[AgentId]()
        gone: set[tuple[AgentId, Epoch]] = set()
        refused: set[AgentId] = set(avoid)
        error: SLLMError | None = None
        for _ in range(self._settings.load_agents_max):
            searched_s = self._clock.now_s()
            placed = await self._place(record, refused, gone, publish)
            if placed is None:
                break
            so_far = Loaded(
                agent=placed.agent,
                predicted_s=placed.predicted_s,
                place_s=self._clock.now_s() - searched_s,
                ingest_s=ingest_s,
            )
            try:
                return await self._load_on(placed, record, so_far, publish, became_ready)
            except AgentLost as lost:
                self._view.failed(placed.agent)
                gone.add((placed.agent, placed.epoch))
                error = lost
            except SLLMError as refusal:
                if refusal.permanent:
                    raise
                refused.add(placed.agent)
                error = refusal
        if error is None or isinstance(error, AgentLost):
            raise NoCapacity(f"no agent can take {model} now", retry_after_s=1.0)
        raise error

    async def _load_on(
        self,
        placed: Placed,
        record: ModelRecord,
        so_far: Loaded,
        publish: Callable[[LoadEvent], None],
        became_ready: Callable[[Loaded], None],
    ) -> Loaded:
        """`so_far`, and what the load on this agent took.

        What befalls it after its first `ready` event is not told: whoever asks the instance
        will see. Others are sent there once its bytes are there too.
        """
        chosen_s = self._clock.now_s()
        ready: Loaded | None = None

        def heard(event: LoadEvent) -> None:
            nonlocal ready
            if event.state != "ready":
                publish(event)
            elif ready is None:
                ready = self._ready(placed, so_far, chosen_s, event)
                became_ready(ready)

        request = LoadRequest(spec=record.spec, checkpoint=record.checkpoint)
        try:
            event = await self._agents.load(placed.address, request, heard)
        except SLLMError:
            if ready is None:
                raise
            return ready
        self._view.became_ready(placed.agent, record.spec.model)
        if ready is None:
            return self._ready(placed, so_far, chosen_s, event)
        return msgspec.structs.replace(ready, hops=event.hops)

    def _ready(self, placed: Placed, so_far: Loaded, chosen_s: float, event: LoadEvent) -> Loaded:
        load_s = self._clock.now_s() - chosen_s
        SCHEDULE_DECISIONS.inc(placed.cache_level.tier)
        note_schedule_error(placed.predicted_s, load_s)
        return msgspec.structs.replace(so_far, load_s=load_s, hops=event.hops)

    async def checkpointed(
        self, model: ModelId, publish: Callable[[LoadEvent], None]
    ) -> ModelRecord:
        """The model's record, with a checkpoint in the store if it needs one."""
        record = self._view.models.get(model)
        if record is None:
            spec = on_demand_spec(model, self._settings, self._view)
        elif record.checkpoint is not None or record.spec.source is None:
            return record
        else:
            spec = record.spec

        def progress(job: JobRecord) -> None:
            publish(ingest_event(job))

        return await self._ingestion.ensure(model, spec, progress)

    def _check_fits(self, record: ModelRecord) -> None:
        """Raise `OutOfSpace` for what no agent's memory could hold even if it were empty."""
        budgets = [seen.record.dram.budget_bytes for seen in self._view.agents.values()]
        if record.checkpoint is None or not budgets:
            return
        size_bytes, largest_bytes = record.checkpoint.size_bytes, max(budgets)
        if size_bytes > largest_bytes:
            raise OutOfSpace(
                f"{record.spec.model} takes {format_size(size_bytes)}, but the largest DRAM tier "
                f"of an agent is {format_size(largest_bytes)}: raise loader.dram_budget_bytes there"
            )

    async def _place(
        self,
        record: ModelRecord,
        refused: Collection[AgentId],
        gone: Collection[tuple[AgentId, Epoch]],
        publish: Callable[[LoadEvent], None],
    ) -> Placed | None:
        """Choose; while every agent is away, wait a little for one to come (back)."""
        deadline_s = self._clock.now_s() + self._settings.agent_wait_s
        while True:
            version = self._view.version
            dead = [
                agent
                for agent, epoch in gone
                if (seen := self._view.agents.get(agent)) is not None and seen.record.epoch == epoch
            ]
            placed = self._places.place(record, {*refused, *dead})
            left_s = deadline_s - self._clock.now_s()
            if placed is not None or refused or left_s <= 0:
                return placed
            publish(LoadEvent(state="queued", stage="no agent"))
            await self._view.changed(version, self._clock, left_s)


def note_schedule_error(predicted_s: float, actual_s: float) -> None:
    """How far off the scheduler's time to the first token was."""
    late_s = actual_s - predicted_s
    SCHEDULE_ERROR_SECONDS.observe(abs(late_s), "late" if late_s > 0 else "early")


def on_demand_spec(
    model: ModelId,
    settings: OrchestratorSettings,
    view: ClusterView,
    names: Mapping[str, ModelId] | None = None,
) -> ModelSpec:
    """The spec of a model that nobody registered, if its name may be asked of the hub.

    `names` are those that may be mentioned; None: all of the view's.

    Raises:
        ModelNotFound: it may not; names some that are registered.
    """
    if "hf" in settings.on_demand_sources and is_hub_name(model):
        return ModelSpec(model=model, source=f"hf://{model}")
    raise ModelNotFound(unknown_model(model, settings, view, names), param="model")


def unknown_model(
    name: str,
    settings: OrchestratorSettings,
    view: ClusterView,
    names: Mapping[str, ModelId] | None = None,
) -> str:
    """What a client is told that asked for a name nobody knows; `names` as for `on_demand_spec`."""
    known = names_like(view.names if names is None else names, name, settings.hint_names_max)
    hint = f"registered: {', '.join(known)}" if known else "no model is registered"
    return f"the model {name[:200]!r} does not exist; {hint}"


def ingest_event(job: JobRecord) -> LoadEvent:
    """An ingest job's progress, as a waiter sees it."""
    stage = "queued" if job.stage is JobStage.RESOLVING else f"ingest: {job.stage}"
    return LoadEvent(
        state="loading", stage=stage, bytes_done=job.bytes_done, bytes_total=job.bytes_total
    )
