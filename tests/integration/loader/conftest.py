"""A real folder store, real tiers in tmp_path and /dev/shm, and checkpoints of random bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3
from crc32c import crc32c

from serverlessllm.checkpoint.index import Chunk, Index, Tensor, checkpoint_id, encode_index
from serverlessllm.core.clock import Clock, SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.service import Loader
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.open import open_objects
from serverlessllm.store.settings import StoreSettings
from serverlessllm.telemetry import render_metrics

CHUNK_BYTES = 64 * 1024
SIZE_BYTES = 5 * CHUNK_BYTES + 12_345
"""Of a checkpoint, unless a test says otherwise: six chunks, the last neither whole nor aligned."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint, and all its bytes."""

    ref: CheckpointRef
    data: bytes
    index: bytes


def make_sample(name: str, size_bytes: int = SIZE_BYTES, chunk_bytes: int = CHUNK_BYTES) -> Sample:
    data = random.Random(name).randbytes(size_bytes)
    parts = [data[at : at + chunk_bytes] for at in range(0, size_bytes, chunk_bytes)]
    index = encode_index(
        Index(
            model=name,
            source=f"file:///{name}",
            revision="r1",
            kind="tensors",
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            chunks=tuple(Chunk(blake3=blake3(p).hexdigest(), crc32c=crc32c(p)) for p in parts),
            tensors=(
                Tensor(name="w", dtype="U8", shape=(size_bytes,), offset=0, size_bytes=size_bytes),
            ),
        )
    )
    ref = CheckpointRef(id=checkpoint_id(index), prefix=f"{name}/r1", size_bytes=size_bytes)
    return Sample(ref=ref, data=data, index=index)


class WatchedStore(CheckpointStore):
    """A folder store that counts what is read from it, and holds reads back while told to. It is
    read by ranges, as one behind a network, unless `is_near`."""

    is_near = False

    def __init__(self, folder: Path) -> None:
        objects = open_objects(folder.as_uri(), StoreSettings(), SystemClock(), create=True)
        super().__init__(objects)
        self.ranges: list[tuple[int, int]] = []
        self.reading = asyncio.Event()
        """Set when a range has been asked for."""
        self.open = asyncio.Event()
        self.open.set()

    @property
    def bytes_read(self) -> int:
        return sum(size for _, size in self.ranges)

    def local_bin(self, prefix: str) -> Path | None:
        return super().local_bin(prefix) if self.is_near else None

    async def read_range(self, prefix: str, offset: int, size: int) -> memoryview:
        self.ranges.append((offset, size))
        self.reading.set()
        await self.open.wait()
        return await super().read_range(prefix, offset, size)


class Bench:
    """The directories of one machine, its store, and loaders on them."""

    def __init__(self, root: Path, shm: Path) -> None:
        self.root = root
        self.nvme_dir = root / "nvme"
        self.dram_dir = shm
        self.store_dir = root / "store"
        self.store = WatchedStore(self.store_dir)
        self.clock: Clock = SystemClock()
        self.settings = LoaderSettings(
            dram_dir=str(shm),
            dram_budget_bytes=4 * SIZE_BYTES,
            nvme_dir=str(self.nvme_dir),
            nvme_budget_bytes=8 * SIZE_BYTES,
            range_bytes=CHUNK_BYTES // 2,
            progress_interval_s=0.0,
        )

    async def publish(self, sample: Sample) -> Sample:
        path = self.root / f"{sample.ref.id}.publish"
        path.write_bytes(sample.data)
        await self.store.publish(sample.ref.prefix, path, sample.index)
        return sample

    @contextlib.asynccontextmanager
    async def starting(self, **changes: object) -> AsyncIterator[Loader]:
        """A loader that may still be checking its leftovers."""
        settings = msgspec.structs.replace(self.settings, **changes)
        loader = Loader(settings, store=self.store, clock=self.clock, data_dir=self.root)
        try:
            await loader.start()
            yield loader
        finally:
            await loader.close()

    @contextlib.asynccontextmanager
    async def loader(self, **changes: object) -> AsyncIterator[Loader]:
        """A loader with its leftovers checked."""
        async with self.starting(**changes) as loader:
            await loader.settled()
            yield loader

    @contextlib.asynccontextmanager
    async def child(
        self, sample: Sample, level: CacheLevel = CacheLevel.DRAM, ranges_before_wait: int = 0
    ) -> AsyncIterator[Process]:
        """Another process that loads `sample`; see child.py. Killed at the end."""
        orders = {
            "root": str(self.root),
            "store": str(self.store_dir),
            "settings": self.settings,
            "ref": sample.ref,
            "level": level,
            "ranges_before_wait": ranges_before_wait,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("child.py")),
            msgspec.json.encode(orders).decode(),
            stdin=PIPE,
            stdout=PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    def dram(self, sample: Sample) -> Path:
        return self.dram_dir / f"{sample.ref.id}.bin"

    def nvme(self, sample: Sample) -> Path:
        return self.nvme_dir / f"{sample.ref.id}.bin"

    def leftovers(self) -> list[str]:
        """Files that no whole checkpoint explains."""
        names = []
        for folder in (self.dram_dir, self.nvme_dir):
            for path in folder.iterdir():
                whole = path.suffix in {".bin", ".idx"} and path.with_suffix(".bin").exists()
                if not whole and not path.name.startswith("."):
                    names.append(path.name)
        return names


@pytest.fixture
def shm() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sllm-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def bench(tmp_path: Path, shm: Path) -> Bench:
    (tmp_path / "nvme").mkdir()
    # Every loader measures the disk once a directory: not what these tests are about.
    device = (tmp_path / "nvme").stat().st_dev
    (tmp_path / "nvme" / ".limits.json").write_bytes(
        msgspec.json.encode(
            {"device": device, "limits": {"disk_bytes_s": 1e9, "memcpy_bytes_s": 1e10}}
        )
    )
    return Bench(tmp_path, shm)


@pytest.fixture(name="make_sample")
def make_sample_fixture() -> Callable[..., Sample]:
    return make_sample


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file without its owner's knowledge: its times stay."""
    status = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture(name="flip")
def flip_fixture() -> Callable[[Path, int], None]:
    return flip


@pytest.fixture
def corrupt_count() -> Callable[[str], float]:
    """How many corrupt chunks of a hop this process has counted."""

    def count(hop: str) -> float:
        pattern = rf'sllm_corrupt_chunks_total{{hop="{hop}"}} (\S+)'
        match = re.search(pattern, render_metrics().decode())
        return float(match[1]) if match else 0.0

    return count
