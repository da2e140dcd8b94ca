"""The verbs that an orchestrator needs of its neighbours, each as narrow as its use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from serverlessllm.core.cluster import JobRecord
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec


class Ingests(Protocol):
    """`serverlessllm.ingest.service.Ingestion`: makes a checkpoint of a model's source."""

    async def ensure(
        self, model: ModelId, spec: ModelSpec, on_progress: Callable[[JobRecord], None]
    ) -> ModelRecord:
        """Return when the checkpoint is published; single flight in the whole cluster."""
        ...


class DeletesCheckpoints(Protocol):
    """`serverlessllm.store.checkpoints.CheckpointStore`: forgets a published checkpoint."""

    async def delete(self, prefix: str) -> object:
        """Remove `.idx` first, then `.bin`; nothing there is not an error."""
        ...
