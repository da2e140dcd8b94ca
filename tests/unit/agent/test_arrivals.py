"""The pipe to the engine: every number in order, no waiting, and an end that tells which."""

from __future__ import annotations

import array
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverlessllm.agent.arrivals import ArrivalsPipe
from serverlessllm.backends.base import ALL_ARRIVED
from serverlessllm.checkpoint.index import Index
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.arrivals import Arriving
from serverlessllm.testing.waiting import eventually

INDEX = Index(
    model="m",
    source="file:///m",
    revision="r",
    kind="tensors",
    size_bytes=0,
    chunks=(),
    tensors=(),
)


class Engine:
    """Reads what it is told."""

    def __init__(self, pipe: ArrivalsPipe) -> None:
        self.end = pipe.read_end
        os.set_blocking(self.end, False)
        self._data = b""

    def read(self) -> bool:
        """Take what is there; whether there may be more to come."""
        try:
            data = os.read(self.end, 4096)
        except BlockingIOError:
            return True
        self._data += data
        return bool(data)

    @property
    def told(self) -> list[int]:
        return array.array("I", self._data).tolist()


@pytest.fixture
def arriving() -> Arriving:
    return Arriving(CheckpointId("0" * 64), INDEX, b"", bin_path=Path("f.bin"), fd=0)


@pytest.fixture
def pipe(arriving: Arriving) -> Iterator[ArrivalsPipe]:
    arriving.add(7)
    pipe = ArrivalsPipe(arriving)
    yield pipe
    pipe.close()
    os.close(pipe.read_end)


async def test_what_arrived_before_what_comes_and_the_end(
    arriving: Arriving, pipe: ArrivalsPipe
) -> None:
    engine = Engine(pipe)
    arriving.add(3)
    assert engine.read()
    assert engine.told == [7, 3]
    arriving.add(0)
    arriving.end(whole=True)
    assert engine.read()
    assert engine.told == [7, 3, 0]
    pipe.finish()
    assert engine.read()
    assert not engine.read()
    assert engine.told == [7, 3, 0, ALL_ARRIVED]


async def test_a_failed_load_is_an_end_before_the_end(
    arriving: Arriving, pipe: ArrivalsPipe
) -> None:
    engine = Engine(pipe)
    arriving.end(whole=False)
    assert engine.read()
    pipe.close()
    pipe.close()
    assert not engine.read()
    assert engine.told == [7]


async def test_more_than_a_pipe_holds_waits_for_the_engine(
    arriving: Arriving, pipe: ArrivalsPipe
) -> None:
    fcntl.fcntl(pipe.read_end, fcntl.F_SETPIPE_SZ, 4096)
    engine = Engine(pipe)
    count = 5000
    for number in range(count):
        arriving.add(number)
    arriving.end(whole=True)
    pipe.finish()
    assert len(engine.told) < count

    await eventually(lambda: not engine.read())
    assert engine.told == [7, *range(count), ALL_ARRIVED]


async def test_an_engine_that_has_gone_stops_nobody(arriving: Arriving) -> None:
    pipe = ArrivalsPipe(arriving)
    os.close(pipe.read_end)
    arriving.add(1)
    arriving.add(2)
    pipe.finish()
    pipe.close()
    assert list(arriving.numbers) == [1, 2]  # they go on arriving for others


async def test_it_is_closed_while_it_waits_for_room(arriving: Arriving) -> None:
    pipe = ArrivalsPipe(arriving)
    fcntl.fcntl(pipe.read_end, fcntl.F_SETPIPE_SZ, 4096)
    for number in range(2000):
        arriving.add(number)
    pipe.close()
    arriving.add(1)
    told = len(os.read(pipe.read_end, 1 << 16)) // 4
    assert 0 < told < 2000
    assert os.read(pipe.read_end, 4) == b""  # nothing comes later: it has been closed
    os.close(pipe.read_end)
