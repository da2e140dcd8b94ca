"""Which checkpoints are whose: the registered models, as far as this node needs to know them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping

from serverlessllm.agent.settings import AgentSettings
from serverlessllm.core.clock import Clock
from serverlessllm.core.cluster import CacheLevel, TierUsage
from serverlessllm.core.errors import MetadataUnavailable
from serverlessllm.core.ids import CheckpointId, ModelId
from serverlessllm.core.models import CheckpointRef, ModelRecord, ModelSpec
from serverlessllm.loader.service import Loader
from serverlessllm.metadata.registry import Registry
from serverlessllm.telemetry import log

_log = log("agent")


class Catalog:
    """Models and their checkpoints: from the loads that were asked for, and, so that copies
    adopted from an earlier life get their names, from the registry. `on_read` is told the names
    of all registered models at each reading."""

    def __init__(
        self,
        registry: Registry,
        loader: Loader,
        settings: AgentSettings,
        clock: Clock,
        *,
        on_read: Callable[[Collection[ModelId]], None],
    ) -> None:
        self._registry = registry
        self._loader = loader
        self._settings = settings
        self._clock = clock
        self._tell_read = on_read
        self._models: dict[ModelId, CheckpointRef] = {}
        self._registered: set[ModelId] = set()
        self._pinned: set[CheckpointId] = set()
        self._registered_pinned: set[CheckpointId] = set()

    async def run(self) -> None:
        """Read the registered models now and then, until cancelled."""
        while True:
            try:
                stored = await self._registry.list_models()
            except MetadataUnavailable:
                pause_s = random.uniform(0, self._settings.reconnect_s_max)  # noqa: S311 - jitter
            else:
                await self._take([each.record for each in stored])
                self._tell_read({each.record.spec.model for each in stored})
                pause_s = self._settings.catalog_interval_s
            await self._clock.sleep(pause_s)

    async def _take(self, records: list[ModelRecord]) -> None:
        """What is registered now; a model that no longer is, is forgotten."""
        registered = {
            record.spec.model: record.checkpoint
            for record in records
            if record.checkpoint is not None
        }
        deleted = self._registered - registered.keys()
        kept = {name: ref for name, ref in self._models.items() if name not in deleted}
        self._models = kept | registered
        self._registered = set(registered)
        pinned = {
            record.checkpoint.id for record in records if record.spec.pinned and record.checkpoint
        }
        unwanted, self._registered_pinned = self._registered_pinned - pinned, pinned
        for checkpoint in unwanted:
            self._pinned.discard(checkpoint)
            await self._loader.unpin(checkpoint)
        for checkpoint in pinned:
            await self._pin(checkpoint)

    async def learn(self, spec: ModelSpec, checkpoint: CheckpointRef | None) -> None:
        """A load was asked for."""
        if checkpoint is not None:
            self._models[spec.model] = checkpoint
            if spec.pinned:
                await self._pin(checkpoint.id)

    def checkpoint(self, model: ModelId) -> CheckpointRef | None:
        """The model's checkpoint, if it is known here."""
        return self._models.get(model)

    def models(self) -> Mapping[ModelId, CheckpointRef]:
        """Every model whose checkpoint is known here."""
        return self._models

    def residents(self) -> Iterator[CheckpointRef]:
        """The known checkpoints that lie on this node."""
        here = self._loader.residency()
        seen: set[CheckpointId] = set()
        for ref in self._models.values():
            if ref.id in here and ref.id not in seen:
                seen.add(ref.id)
                yield ref

    def levels(self) -> Mapping[CheckpointId, CacheLevel]:
        """The nearest tier of this node that has each checkpoint, engines aside: one look at the
        directories, so ask once for many."""
        return self._loader.residency()

    def dram(self) -> TierUsage:
        """How full the DRAM tier is."""
        return self._loader.usage()[0]

    def pinned(self, checkpoint: CheckpointId) -> bool:
        """Whether it stays in DRAM with or without an instance."""
        return checkpoint in self._pinned and self.levels().get(checkpoint) is CacheLevel.DRAM

    async def _pin(self, checkpoint: CheckpointId) -> None:
        """Until no registered model wants it pinned any more. What a failing disk does not let
        be pinned is tried again with the next reading."""
        if checkpoint in self._pinned:
            return
        self._pinned.add(checkpoint)
        try:
            await self._loader.pin(checkpoint)
        except OSError as error:
            self._pinned.discard(checkpoint)
            _log.warning("checkpoint not pinned", checkpoint=checkpoint, error=repr(error))
