"""A store that misbehaves on the wire, spoken to by the real client."""

import asyncio
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from serverlessllm.core.clock import Clock, SystemClock
from serverlessllm.core.errors import CheckpointError, OutOfSpace, StoreUnavailable
from serverlessllm.store.checkpoints import CheckpointMissing, CheckpointStore
from serverlessllm.store.errors import AccessDenied, ObjectChanged, is_disk_full, reason
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.contracts.store import PREFIX, write_checkpoint

BODY = bytes(range(256)) * 16
SETTINGS = StoreSettings(
    allow_http=True,
    region="us-east-1",
    options={"access_key_id": "KEY", "secret_access_key": "SECRET"},
    tries=3,
    retry_min_s=0.001,
    retry_max_s=0.002,
)

Answer = Callable[["Wire", asyncio.StreamWriter, int, int], Awaitable[None]]


class Wire:
    """An S3 of one object that answers each GET with the next of `answers`, then well."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.gets = 0
        self.asked = asyncio.Event()
        self.endpoint = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, last = 0, len(BODY) - 1
                for line in head.split("\r\n"):
                    if line.lower().startswith("range:"):
                        first, last = map(int, line.partition("=")[2].split("-"))
                if head.startswith("HEAD"):
                    await respond(writer, 200, b"", length=len(BODY))
                    continue
                self.gets += 1
                self.asked.set()
                answer = self.answers.pop(0) if self.answers else well
                await answer(self, writer, first, last)

    def store(self, clock: Clock | None = None, **settings: object) -> CheckpointStore:
        changed = msgspec.structs.replace(SETTINGS, endpoint=self.endpoint, **settings)
        return open_store("s3://models", changed, clock or SystemClock())


async def respond(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes,
    *,
    length: int | None = None,
    span: str | None = None,
    etag: str = "one",
) -> None:
    lines = [
        f"HTTP/1.1 {status} X",
        f"content-length: {len(body) if length is None else length}",
        f'etag: "{etag}"',
        "last-modified: Thu, 01 Jan 2026 00:00:00 GMT",
        *([f"content-range: bytes {span}/{len(BODY)}"] if span else []),
    ]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    await writer.drain()


async def well(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    await respond(writer, 206, BODY[first : last + 1], span=f"{first}-{last}")


async def cut(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    size = last + 1 - first
    await respond(writer, 206, BODY[first:last], length=size, span=f"{first}-{last}")
    writer.close()


async def whole(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    await respond(writer, 200, BODY)


async def other_range(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    await respond(writer, 206, BODY[: last + 1 - first], span=f"0-{last - first}")


async def busy(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    await respond(writer, 503, b"<Error><Code>SlowDown</Code></Error>")


async def throttled(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    await respond(writer, 429, b"")


async def reset(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    writer.transport.abort()


async def replaced(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    """A server that heeds If-Match."""
    await respond(writer, 412, b"")


async def replaced_silently(
    wire: Wire, writer: asyncio.StreamWriter, first: int, last: int
) -> None:
    await respond(writer, 206, BODY[first : last + 1], span=f"{first}-{last}", etag="two")


async def never(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
    await asyncio.Event().wait()


def refusing(status: int) -> Answer:
    async def refuse(wire: Wire, writer: asyncio.StreamWriter, first: int, last: int) -> None:
        await respond(writer, status, b"<Error><Message>SECRET</Message></Error>")

    return refuse


@asynccontextmanager
async def serving() -> AsyncIterator[Wire]:
    wire = Wire()
    connections: set[asyncio.Task[None]] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await wire.serve(reader, writer)
        finally:
            writer.transport.abort()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.ensure_future(converse(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    wire.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield wire
    finally:
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        server.close()
        await server.wait_closed()


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with serving() as running:
        yield running


@pytest.mark.parametrize("fault", [cut, whole, other_range, busy, throttled, reset])
async def test_a_range_that_fails_is_asked_for_again(wire: Wire, fault: Answer) -> None:
    wire.answers = [fault, fault]
    assert bytes(await wire.store().read_range(PREFIX, 100, 1000)) == BODY[100:1100]
    assert wire.gets == 3


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (cut, "cut a body"),
        (whole, "ignores ranges"),
        (busy, "503"),
        (throttled, "429"),
        (reset, "s3://models"),
    ],
)
async def test_a_range_that_always_fails_says_why(wire: Wire, fault: Answer, says: str) -> None:
    wire.answers = [fault] * 3
    with pytest.raises(StoreUnavailable, match=says) as raised:
        await wire.store().read_range(PREFIX, 100, 1000)
    assert wire.gets == SETTINGS.tries
    assert "127.0.0.1" in raised.value.message
    assert raised.value.retry_after_s


@pytest.mark.parametrize("fault", [replaced, replaced_silently])
async def test_a_replaced_object_is_never_mixed_in(wire: Wire, fault: Answer) -> None:
    store = wire.store()
    await store.read_range(PREFIX, 0, 100)
    wire.answers = [fault]
    with pytest.raises(ObjectChanged):
        await store.read_range(PREFIX, 100, 100)
    assert wire.gets == 2  # not tried again: it will not come back
    assert bytes(await store.read_range(PREFIX, 100, 100)) == BODY[100:200]


@pytest.mark.parametrize(
    ("status", "kind"), [(401, AccessDenied), (403, AccessDenied), (404, CheckpointMissing)]
)
async def test_a_refusal_is_not_tried_again(wire: Wire, status: int, kind: type[Exception]) -> None:
    wire.answers = [refusing(status)] * 3
    with pytest.raises(kind) as raised:
        await wire.store().read_range(PREFIX, 0, 10)
    assert wire.gets == 1
    assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_listing_is_a_refusal_too(wire: Wire, status: int) -> None:
    """The object store's client has no type of its own for it."""
    wire.answers = [refusing(status)] * 3
    with pytest.raises(AccessDenied, match="check the store's keys and rights") as raised:
        await wire.store().check()
    assert "SECRET" not in str(raised.value)


async def test_a_slow_range_is_given_up_and_asked_for_again(wire: Wire) -> None:
    clock = VirtualClock()
    wire.answers = [never]
    reading = asyncio.create_task(wire.store(clock).read_range(PREFIX, 0, 1000))
    await wire.asked.wait()
    await clock.advance(SETTINGS.slow_window_s - 0.1)
    assert not reading.done()
    assert wire.gets == 1
    while not reading.done():  # give up, pause, ask again: each by the same clock
        await clock.advance(0.2 if clock.sleepers and wire.gets == 1 else 0.0)
    assert bytes(await reading) == BODY[:1000]
    assert wire.gets == 2


async def test_a_range_that_stays_slow_is_an_error(wire: Wire) -> None:
    wire.answers = [never] * 3
    store = wire.store(slow_window_s=0.05, slow_bytes_s=1e9)
    with pytest.raises(StoreUnavailable, match="too slow"):
        await store.read_range(PREFIX, 0, 1000)
    assert wire.gets == SETTINGS.tries


async def test_a_cancelled_read_stops(wire: Wire) -> None:
    wire.answers = [never]
    reading = asyncio.create_task(wire.store().read_range(PREFIX, 0, 1000))
    await wire.asked.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert wire.gets == 1


async def test_an_index_that_is_too_long_is_not_read(wire: Wire) -> None:
    with pytest.raises(CheckpointError, match="limit"):
        await wire.store(index_bytes_max=100).read_index(PREFIX)
    assert wire.gets == 0


FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import OutOfSpace
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.contracts.store import PREFIX, write_checkpoint

async def main(folder: Path, elsewhere: Path) -> None:
    path, idx = write_checkpoint(elsewhere, 300_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    store = open_store(f"file://{folder}", StoreSettings(part_bytes=64 * 1024), SystemClock())
    try:
        await store.publish(PREFIX, path, idx)
    except OutOfSpace as error:
        print("out of space:", error.message, flush=True)
    print("left:", sorted(str(path) for path in folder.rglob("*")))

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit of a file's size stands in for the disk's end: the writes fail half-way."""
    store = tmp_path / "store"
    store.mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:  # so that it is copied
        found = subprocess.run(
            [sys.executable, "-c", FULL, str(store), elsewhere],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert "out of space: the store file://" in found.stdout, found.stderr
    assert "left: []" in found.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("error trying to connect: Connection refused (os error 111)", "refuses connections"),
        ("dns error: failed to lookup address information", "host name"),
        ("Server returned error: status 503 Service Unavailable: body", "503"),
        ("HTTP error: request or response body error", "cut a body"),
        ("operation timed out https://h/?X-Amz-Signature=abc", "in time"),
        ("something https://h/?sig=abc", "failed"),
    ],
)
def test_reasons_are_our_own_words(text: str, words: str) -> None:
    assert words in reason(text)
    assert "abc" not in reason(text)


def test_a_full_disk_is_told_by_the_kernel_s_words() -> None:
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        assert is_disk_full(str(OSError(number, os.strerror(number))))
    assert not is_disk_full("permission denied")
    assert OutOfSpace.status == 507


async def test_a_checkpoint_of_a_killed_publisher_does_not_stay(tmp_path: Path) -> None:
    """What the object store's writer had staged: swept by the next who is alone there."""
    store = open_store(f"file://{tmp_path}/store", StoreSettings(), SystemClock())
    assert store.root is not None
    folder = store.root / PREFIX
    folder.mkdir(parents=True)
    (folder / "model.bin#1").write_bytes(b"half")
    path, idx = write_checkpoint(tmp_path)
    await store.publish(PREFIX, path, idx)
    assert sorted(entry.name for entry in folder.iterdir()) == ["model.bin", "model.idx"]
