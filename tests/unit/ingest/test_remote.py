"""Remote files read through the fetcher: exact, in bounded memory, with a source's errors."""

import asyncio
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore import Bytes

from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import (
    CheckpointError,
    SLLMError,
    SourceUnavailable,
    StoreUnavailable,
)
from serverlessllm.ingest.errors import SourceChanged, SourceDenied
from serverlessllm.ingest.remote import Fetcher, RemoteFile
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.store.errors import AccessDenied, ObjectChanged, ObjectMissing
from serverlessllm.store.objects import Objects
from serverlessllm.store.open import open_objects
from serverlessllm.store.settings import StoreSettings

DATA = os.urandom(10_000)
SETTINGS = IngestSettings(block_bytes=512, read_ahead_blocks=4, cached_blocks=6)


class Counting:
    """Objects that count the reads under way, and may fail."""

    def __init__(self) -> None:
        inner = open_objects("memory://", StoreSettings(), SystemClock())
        asyncio.run(inner.put_new("file", DATA))
        self.inner: Objects = inner
        self.where = inner.where
        self.running = self.most = self.reads = 0
        self.failure: Exception | None = None

    async def read(self, path: str, offset: int, size: int, *, etag: str | None) -> Bytes:
        self.running += 1
        self.most = max(self.most, self.running)
        self.reads += 1
        try:
            await asyncio.sleep(0)
            if self.failure is not None:
                raise self.failure
            return await self.inner.read(path, offset, size, etag=etag)
        finally:
            self.running -= 1


@pytest.fixture(scope="module")
def objects() -> Counting:
    return Counting()


@pytest.fixture(scope="module")
def file(objects: Counting) -> Iterator[RemoteFile]:
    with Fetcher(SETTINGS) as fetcher:
        yield remote(objects, fetcher)


def remote(objects: Counting, fetcher: Fetcher) -> RemoteFile:
    return RemoteFile(
        name="file",
        path="file",
        size_bytes=len(DATA),
        etag=None,
        version="1",
        objects=objects,  # type: ignore[arg-type] # the two verbs that are used
        fetcher=fetcher,
    )


def read(file: RemoteFile, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    file.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@given(spans=st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 3000)), max_size=8))
def test_any_order_of_reads_is_exact(file: RemoteFile, spans: list[tuple[int, int]]) -> None:
    for offset, length in spans:
        size = min(length, len(DATA) - offset)
        assert read(file, offset, size) == DATA[offset : offset + size]


def test_a_file_read_in_order_is_fetched_once_and_ahead() -> None:
    objects = Counting()
    with Fetcher(SETTINGS) as fetcher:
        file = remote(objects, fetcher)
        whole = b"".join(read(file, at, min(700, len(DATA) - at)) for at in range(0, 10_000, 700))
    assert whole == DATA
    assert objects.reads == -(-len(DATA) // SETTINGS.block_bytes)
    assert 1 < objects.most <= SETTINGS.cached_blocks


def test_what_is_outside_is_not_asked_for(file: RemoteFile) -> None:
    for offset, size in ((len(DATA), 1), (9_999, 2), (-1, 1)):
        with pytest.raises(CheckpointError, match="ends at"):
            read(file, offset, size)


@pytest.mark.parametrize(
    ("failure", "kind", "says"),
    [
        (ObjectMissing(), SourceChanged, "changed"),
        (ObjectChanged("x"), SourceChanged, "changed"),
        (AccessDenied("x"), SourceDenied, "HF_TOKEN"),
        (StoreUnavailable("the store x is away"), SourceUnavailable, "the source x"),
    ],
)
def test_a_failed_read_is_said_of_the_source(
    failure: Exception, kind: type[SLLMError], says: str
) -> None:
    objects = Counting()
    objects.failure = failure
    with Fetcher(SETTINGS) as fetcher:
        file = remote(objects, fetcher)
        with pytest.raises(kind, match=says):
            read(file, 0, 100)
        objects.failure = None
        assert read(file, 0, 100) == DATA[:100]  # a failure is not remembered


def test_leaving_ends_what_is_under_way() -> None:
    objects = Counting()
    with Fetcher(SETTINGS) as fetcher:
        read(remote(objects, fetcher), 0, 1)
    assert objects.running == 0
