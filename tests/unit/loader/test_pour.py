"""A chunk in blocks: every byte once, checked, whatever its size and its source."""

from __future__ import annotations

import errno

import pytest
from blake3 import blake3
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.loader import pour as module
from serverlessllm.loader.plan import ChunkRange
from serverlessllm.loader.pour import Blake3, Check, Crc32c, Parts, Unchecked, pour, write_staged
from serverlessllm.loader.tiers.staging import Staging

STAGING = Staging(1)


class Memory:
    """A source and a sink."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def read_into(self, view: memoryview, offset: int, size: int) -> None:
        view[:size] = self.data[offset : offset + size]

    def write(self, view: memoryview, offset: int) -> None:
        self.data[offset : offset + len(view)] = view


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("check", [Crc32c, Blake3, Unchecked])
def test_sizes_around_a_block(size: int, check: type) -> None:
    data = bytes(range(7, 7 + size)) if size < 249 else b""
    made: dict[type, Check] = {
        Crc32c: Crc32c(crc32c(data)),
        Blake3: Blake3(blake3(data).hexdigest()),
        Unchecked: Unchecked(),
    }
    source, sink = Memory(bytes(128) + data), Memory(bytes(128))
    chunk = ChunkRange(number=0, offset=128, size_bytes=size)
    assert pour(source, sink, chunk, made[check], STAGING)
    assert sink.data == source.data


@pytest.mark.parametrize("at", [0, 70, 129])
def test_a_wrong_byte_anywhere_is_noticed(at: int) -> None:
    data = bytes(130)
    wrong = bytearray(data)
    wrong[at] ^= 1
    chunk = ChunkRange(number=0, offset=0, size_bytes=130)
    for check in (Crc32c(crc32c(data)), Blake3(blake3(data).hexdigest())):
        assert not pour(Memory(bytes(wrong)), Memory(b""), chunk, check, STAGING)


def test_a_source_that_cannot_be_read_is_a_wrong_one_and_other_failures_are_failures() -> None:
    class Failing:
        def __init__(self, number: int) -> None:
            self.number = number

        def read_into(self, view: memoryview, offset: int, size: int) -> None:
            raise OSError(self.number, "failed")

    chunk = ChunkRange(number=0, offset=0, size_bytes=10)
    assert not pour(Failing(errno.EIO), Memory(b""), chunk, Unchecked(), STAGING)
    with pytest.raises(OSError, match="failed"):
        pour(Failing(errno.EBADF), Memory(b""), chunk, Unchecked(), STAGING)


@given(st.lists(st.binary(max_size=150), min_size=1, max_size=5).filter(any))
def test_parts_of_any_size_come_together(parts: list[bytes]) -> None:
    data = b"".join(parts)
    chunk = ChunkRange(number=3, offset=256, size_bytes=len(data))
    sink = Memory(bytes(256))
    write_staged(sink, chunk, [memoryview(part) for part in parts], STAGING)
    assert sink.data[256:] == data
    view = memoryview(bytearray(2))
    if len(data) > 2:
        Parts(256, [memoryview(part) for part in parts]).read_into(view, 257, 2)
        assert view == data[1:3]
