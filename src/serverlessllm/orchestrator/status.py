"""What is known of a model now, in the words of whoever asks: is it ready, and if not, how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.cluster import CacheLevel, JobStage, ModelOnAgent
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.failures import error_of
from serverlessllm.core.ids import ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.loads import ingest_event
from serverlessllm.orchestrator.view import ClusterView, is_ready

COLD = "cold"
DELETED = "deleted"
INGESTING = "ingesting"
READY = "ready"
_ON_THE_WAY = (
    InstanceState.STARTING,
    InstanceState.LOADING,
    InstanceState.QUEUED,
    InstanceState.DRAINING,
)
"""What is told of a model without a ready instance: the first of these that an agent reports."""

Placements = Mapping[ModelId, Sequence[ModelOnAgent]]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model now."""

    model: ModelId
    state: str
    """`ready`, `ingesting`, `cold`, `deleted`, or as a load event or an instance has it."""
    stage: str = ""
    bytes_done: int = 0
    bytes_total: int | None = None
    eta_s: float | None = None
    agents_ready: int = 0
    cache_level: str = ""
    """The nearest tier that holds its bytes; empty: nobody has them yet."""
    error: SLLMError | None = None
    """Why its ingest or its last load failed, moments ago."""


def placements_of(view: ClusterView) -> Placements:
    """All that agents report, by model: for whoever asks for many models' status."""
    found: dict[ModelId, list[ModelOnAgent]] = {}
    for seen in view.agents.values():
        for model, on_agent in seen.models.items():
            found.setdefault(model, []).append(on_agent)
    return found


def status_of(
    model: ModelId, view: ClusterView, room: WaitingRoom, placements: Placements | None = None
) -> Status:
    """What is known of a model. Whoever looks wakes nothing."""
    record = view.models.get(model)
    if record is None:
        return Status(model=model, state=DELETED)
    if placements is None:
        on_agents: Sequence[ModelOnAgent] = [
            on for seen in view.agents.values() if (on := seen.models.get(model)) is not None
        ]
    else:
        on_agents = placements.get(model, ())
    known = Status(
        model=model,
        state=READY,
        agents_ready=sum(is_ready(on) for on in on_agents),
        cache_level=_nearest(on_agents, stored=record.checkpoint is not None),
    )
    return known if known.agents_ready else _not_ready(known, on_agents, view, room)


def _not_ready(
    known: Status, on_agents: Sequence[ModelOnAgent], view: ClusterView, room: WaitingRoom
) -> Status:
    event = room.progress_of(known.model)
    job = view.jobs.get(known.model)
    ingesting = job is not None and job.stage not in {JobStage.DONE, JobStage.FAILED}
    if job is not None and ingesting:
        event = ingest_event(job)
    if event is None or event.state in {"ready", "failed"}:
        states = {on.state for on in on_agents}
        # One that is ready here has bytes that still move.
        moving = {InstanceState.LOADING} if InstanceState.READY in states else states
        state = next((str(state) for state in _ON_THE_WAY if state in moving), COLD)
        error = room.failure_of(known.model)
        if error is None and job is not None and job.error is not None and not known.cache_level:
            error = error_of(job.error)
        return msgspec.structs.replace(known, state=state, error=error if state == COLD else None)
    return _on_its_way(known, event, INGESTING if ingesting else event.state)


def _on_its_way(known: Status, event: LoadEvent, state: str) -> Status:
    return msgspec.structs.replace(
        known,
        state=state,
        stage=event.stage,
        bytes_done=event.bytes_done,
        bytes_total=event.bytes_total,
        eta_s=event.eta_s,
    )


def _nearest(on_agents: Sequence[ModelOnAgent], *, stored: bool) -> str:
    level = min((on.cache_level for on in on_agents), default=CacheLevel.STORE)
    return level.tier if stored or level is not CacheLevel.STORE else ""
