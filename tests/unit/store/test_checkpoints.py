"""What every store must do; `tests/integration/store` runs the same suite on a real S3."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverlessllm.core.clock import SystemClock
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.contracts.store import CheckpointStoreContract

SETTINGS = StoreSettings(part_bytes=64 * 1024, upload_concurrency=2)


class TestFolder(CheckpointStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> CheckpointStore:
        return open_store(f"file://{tmp_path}/store", SETTINGS, SystemClock())


class TestOtherDisk(CheckpointStoreContract):
    """A folder that the `.bin` cannot be linked into."""

    @pytest.fixture
    def store(self) -> Iterator[CheckpointStore]:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield open_store(f"file://{folder}/store", SETTINGS, SystemClock())


class TestMemory(CheckpointStoreContract):
    @pytest.fixture
    def store(self) -> CheckpointStore:
        return open_store("memory://", SETTINGS, SystemClock())
