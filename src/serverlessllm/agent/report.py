"""What the agent says of itself: the record of a heartbeat and of `GET /status`."""

from __future__ import annotations

from collections.abc import Sequence

from serverlessllm.agent.catalog import Catalog
from serverlessllm.agent.instance import Instance
from serverlessllm.agent.instances import Instances
from serverlessllm.core.cluster import CacheLevel, ModelOnAgent
from serverlessllm.core.ids import CheckpointId, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.telemetry.table import QUEUE_LEN

_ORDER = (
    InstanceState.READY,
    InstanceState.STARTING,
    InstanceState.LOADING,
    InstanceState.QUEUED,
    InstanceState.DRAINING,
)
"""Of several instances, the state that says most about what a request would meet."""


def models_here(instances: Instances, catalog: Catalog) -> tuple[ModelOnAgent, ...]:
    """Every model that has bytes, instances or a history on this node, by name."""
    known = {model: (slots, start_s) for model, slots, start_s in instances.known()}
    levels = catalog.levels()
    rows: list[ModelOnAgent] = []
    for model in sorted({*known, *catalog.models()}):
        slots, start_s = known.get(model, (None, None))
        here = instances.of(model)
        checkpoint = _checkpoint(model, here, catalog)
        level = CacheLevel.STORE if checkpoint is None else levels.get(checkpoint, CacheLevel.STORE)
        ready = [instance for instance in here if instance.usable]
        if level is CacheLevel.STORE and not here and start_s is None:
            continue
        held = 0 if slots is None else slots.held
        QUEUE_LEN.set(held, model)
        rows.append(
            ModelOnAgent(
                model=model,
                checkpoint=checkpoint,
                cache_level=CacheLevel.DEVICE if ready else level,
                state=_state(here),
                arriving=bool(ready) and all(instance.arriving for instance in ready),
                kv_hit_rate=_mean([instance.kv_hit_rate for instance in ready]),
                queue_len=held,
                slots=max(1, sum(instance.slots for instance in ready)),
                instances=len(here),
                expires_in_s=_expires_in_s(ready, instances),
                start_s=start_s,
                service_s=None if slots is None else slots.service_s,
            )
        )
    return tuple(rows)


def _checkpoint(model: ModelId, here: Sequence[Instance], catalog: Catalog) -> CheckpointId | None:
    for instance in here:
        if instance.checkpoint_id is not None:
            return instance.checkpoint_id
    ref = catalog.checkpoint(model)
    return None if ref is None else ref.id


def _state(here: Sequence[Instance]) -> InstanceState | None:
    states = {
        instance.state if instance.pending or instance.usable else InstanceState.DRAINING
        for instance in here
    }
    return next((state for state in _ORDER if state in states), None)


def _expires_in_s(ready: Sequence[Instance], instances: Instances) -> float | None:
    """When the model's last instance will go; None: not by itself."""
    times = [instances.expires_in_s(instance) for instance in ready]
    left = [at_s for at_s in times if at_s is not None]
    return max(left) if left and len(left) == len(times) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
