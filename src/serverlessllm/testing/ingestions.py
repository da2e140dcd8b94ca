"""Several ingestions over one metadata store and one checkpoint store, as processes would be."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from serverlessllm.checkpoint.index import decode_index
from serverlessllm.checkpoint.reader import verify
from serverlessllm.core.clock import Clock, SystemClock
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.core.units import MIB
from serverlessllm.ingest.service import Ingestion
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.metadata.registry import Registry
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.metadata.sqlite import SqliteMetadata
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.hub import HubServer

MODEL = ModelId("org/name")

SOURCES = StoreSettings(tries=3, retry_min_s=0.01, retry_max_s=0.05)
SETTINGS = IngestSettings(
    sources=SOURCES,
    space_margin_bytes=MIB,
    worker_retry_min_s=0.01,
    worker_retry_max_s=0.05,
    progress_interval_s=0.01,
)


class Cluster:
    """Ingestions that share one metadata store and one checkpoint store, as processes would."""

    def __init__(self, folder: Path, hub: HubServer, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.store = open_store(f"file://{folder}/store", StoreSettings(), SystemClock())
        self.work_dir = folder / "ingest"
        self.settings = msgspec.structs.replace(SETTINGS, hub_endpoint=hub.url)
        self._stack = stack

    async def join(
        self,
        settings: IngestSettings | None = None,
        *,
        clock: Clock | None = None,
        store: CheckpointStore | None = None,
    ) -> Ingestion:
        """One more process's ingestion; `clock` is its own, leases always run on the real one."""
        clock = clock or SystemClock()
        ingestion = Ingestion(
            self.registry(),
            store or self.store,
            settings or self.settings,
            clock,
            work_dir=self.work_dir,
        )
        await ingestion.start()
        self._stack.push_async_callback(ingestion.close)
        return ingestion

    def metadata(self) -> SqliteMetadata:
        """One more process's connection to the metadata store."""
        metadata = SqliteMetadata(self.folder / "metadata.db", MetadataSettings(), SystemClock())
        self._stack.push_async_callback(metadata.close)
        return metadata

    def registry(self) -> Registry:
        """The same, typed."""
        return Registry(self.metadata())

    async def check(self, record: ModelRecord) -> bytes:
        """The `.idx` of a published model, after checking all of its bytes."""
        assert record.checkpoint is not None
        assert self.store.root is not None
        idx = await self.store.read_index(record.checkpoint.prefix)
        verify(self.store.root / record.checkpoint.prefix / "model.bin", decode_index(idx))
        return idx

    @property
    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.work_dir.iterdir())


def spec_of(source: str, model: ModelId = MODEL) -> ModelSpec:
    return ModelSpec(model=model, source=source)
