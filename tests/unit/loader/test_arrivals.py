"""What has arrived of a checkpoint, as those see it who begin before its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serverlessllm.checkpoint.index import Chunk, Index
from serverlessllm.core.ids import CheckpointId
from serverlessllm.loader.arrivals import Arriving

INDEX = Index(
    model="m",
    source="file:///m",
    revision="r",
    kind="tensors",
    size_bytes=100,
    chunk_bytes=64,
    chunks=(Chunk(blake3="0" * 64, crc32c=0),) * 2,
    tensors=(),
)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "f.partial", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def arriving(tmp_path: Path, file: int) -> Arriving:
    checkpoint = CheckpointId("0" * 64)
    return Arriving(checkpoint, INDEX, b"idx", bin_path=tmp_path / "f.bin", fd=file)


def test_each_follower_sees_every_number_in_order_however_late(arriving: Arriving) -> None:
    seen: list[list[int]] = []
    arriving.follow(lambda: seen.append(list(arriving.numbers)))
    arriving.add(1)
    late: list[list[int]] = [list(arriving.numbers)]
    arriving.follow(lambda: late.append(list(arriving.numbers)))
    arriving.add(0)
    assert seen == late == [[1], [1, 0]]


def test_who_follows_no_more_is_told_no_more(arriving: Arriving) -> None:
    told: list[int] = []
    undo = arriving.follow(lambda: told.append(1))
    arriving.add(0)
    undo()
    arriving.add(1)
    arriving.end(whole=True)
    assert told == [1]


def test_a_follower_may_leave_while_it_is_told(arriving: Arriving) -> None:
    told: list[str] = []

    def once() -> None:
        told.append("first")
        undo()

    undo = arriving.follow(once)
    arriving.follow(lambda: told.append("second"))
    arriving.add(0)
    assert told == ["first", "second"]


@pytest.mark.parametrize("whole", [True, False])
def test_the_first_end_counts(arriving: Arriving, *, whole: bool) -> None:
    told: list[bool] = []
    arriving.follow(lambda: told.append(arriving.ended))
    assert not arriving.ended
    arriving.end(whole=whole)
    arriving.end(whole=not whole)
    assert (arriving.ended, arriving.whole) == (True, whole)
    assert told == [True]


def test_its_descriptor_is_read_only_and_outlives_the_name(
    arriving: Arriving, tmp_path: Path, file: int
) -> None:
    mine = arriving.open()
    try:
        os.write(file, b"bytes")
        (tmp_path / "f.partial").unlink()
        arriving.end(whole=False)
        assert os.pread(mine, 5, 0) == b"bytes"
        assert not os.get_inheritable(mine)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(mine, b"x")
    finally:
        os.close(mine)
