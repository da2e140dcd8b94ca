"""Real GPUs, a folder store, and the tiers of one node."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from crc32c import crc32c
from tests.conftest import NEEDS

from serverlessllm.checkpoint.index import Chunk, Index, Tensor, encode_index
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.models import CheckpointRef
from serverlessllm.core.units import MIB
from serverlessllm.loader.device import open_accelerator
from serverlessllm.loader.service import Loader
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings

CHUNK_BYTES = MIB
LAYER_BYTES = 5 * MIB + 64
LAYERS = 9
SIZE_BYTES = LAYERS * LAYER_BYTES


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{NEEDS} an NVIDIA GPU")


@pytest.fixture
def _two_gpus(_gpu: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{NEEDS} two NVIDIA GPUs")


class Node:
    """One checkpoint in a store, and loaders that bring it onto GPUs."""

    def __init__(self, root: Path, shm: Path) -> None:
        self.root = root
        self.data = random.Random(3).randbytes(SIZE_BYTES)
        self.store = open_store((root / "store").as_uri(), StoreSettings(), SystemClock())
        self.settings = {
            "dram_dir": str(shm),
            "dram_budget_bytes": 2 * SIZE_BYTES,
            "nvme_budget_bytes": 2 * SIZE_BYTES,
            "device": "cuda",
        }

    async def publish(self) -> CheckpointRef:
        path = self.root / "model.bin"
        path.write_bytes(self.data)
        parts = [self.data[at : at + CHUNK_BYTES] for at in range(0, SIZE_BYTES, CHUNK_BYTES)]
        index = Index(
            model="gpu",
            source="file:///gpu",
            revision="r1",
            kind="tensors",
            size_bytes=SIZE_BYTES,
            chunk_bytes=CHUNK_BYTES,
            chunks=tuple(Chunk(blake3=blake3(p).hexdigest(), crc32c=crc32c(p)) for p in parts),
            tensors=tuple(
                Tensor(
                    name=f"model.layers.{number}.weight",
                    dtype="U8",
                    shape=(LAYER_BYTES,),
                    offset=number * LAYER_BYTES,
                    size_bytes=LAYER_BYTES,
                )
                for number in range(LAYERS)
            ),
        )
        return await self.store.publish("gpu/r1", path, encode_index(index))

    @contextlib.asynccontextmanager
    async def loader(self, **changes: object) -> AsyncIterator[Loader]:
        settings = LoaderSettings(**{**self.settings, **changes})  # type: ignore[arg-type] # a test's choice
        loader = Loader(
            settings,
            store=self.store,
            clock=SystemClock(),
            data_dir=self.root,
            accelerator=open_accelerator(settings),
        )
        try:
            await loader.start()
            await loader.settled()
            yield loader
        finally:
            await loader.close()


@pytest.fixture
def node(tmp_path: Path, _gpu: None) -> Iterator[Node]:
    shm = Path(tempfile.mkdtemp(prefix="sllm-test-", dir="/dev/shm"))
    yield Node(tmp_path, shm)
    shutil.rmtree(shm, ignore_errors=True)
