"""`min_replicas`: models that stay warm although nobody asks."""

from __future__ import annotations

from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import ModelId
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView, ready_agents


async def keep_replicas(
    view: ClusterView,
    router: Router,
    room: WaitingRoom,
    settings: OrchestratorSettings,
    clock: Clock,
) -> None:
    """Have what is missing loaded, at each change of the view; ends by cancellation only.

    One replica of a model at a time: the next one is seen to be missing when that is ready.
    """
    while True:
        version = view.version
        for model in missing_replicas(view):
            ready = ready_agents(view, model)
            record = view.models[model]
            raw = record.checkpoint is None and record.spec.source is not None
            if raw or router.place(record, ready) is not None:
                room.hold(model, elsewhere=bool(ready))
        await view.changed(version, clock, settings.replicas_interval_s)


def missing_replicas(view: ClusterView) -> list[ModelId]:
    """Models with fewer ready instances than their minimum."""
    return [
        model
        for model, record in view.models.items()
        if record.spec.min_replicas > 0
        and len(ready_agents(view, model)) < record.spec.min_replicas
    ]
