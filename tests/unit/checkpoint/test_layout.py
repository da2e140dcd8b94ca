"""The plan of a `.bin`: any window of it is the same bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.checkpoint.layout import Layout, RawTensor, arrange
from serverlessllm.checkpoint.sources.base import MemoryFile

SOURCE = MemoryFile("source", bytes(range(256)) * 8)


def raw_tensor(name: str, offset: int, size: int, file: MemoryFile = SOURCE) -> RawTensor:
    return RawTensor(
        name=name, dtype="U8", shape=(size,), file=file, offset=offset, size_bytes=size
    )


def plan(tensors: list[RawTensor], side: bytes = b"") -> Layout:
    files = [MemoryFile("config.json", side)] if side else []
    return arrange(tensors, files, aliases={}, architecture=None)


def whole(layout: Layout) -> bytes:
    data = bytearray(b"\xee" * layout.size_bytes)
    layout.read_into(0, memoryview(data))
    return bytes(data)


@given(st.data())
def test_every_window_is_a_part_of_the_whole(data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 300)), min_size=1))
    layout = plan([raw_tensor(f"l.{n}", *piece) for n, piece in enumerate(pieces)], b"{}")
    expected = whole(layout)
    start = data.draw(st.integers(0, layout.size_bytes))
    stop = data.draw(st.integers(start, layout.size_bytes))
    window = bytearray(b"\xee" * (stop - start))
    layout.read_into(start, memoryview(window))
    assert window == expected[start:stop]
    for tensor in layout.tensors:
        offset, size = pieces[int(tensor.name.partition(".")[2])]
        assert tensor.offset % 64 == 0
        assert expected[tensor.offset : tensor.offset + size] == SOURCE.data[offset : offset + size]


def test_gaps_are_zeros() -> None:
    layout = plan([raw_tensor("a", 1, 3), raw_tensor("b", 7, 2)], b"{}")
    assert whole(layout) == b"\1\2\3" + bytes(61) + b"\7\10" + bytes(62) + b"{}"


def test_neighbours_are_read_at_once() -> None:
    side_by_side = [raw_tensor("a", 0, 128), raw_tensor("b", 128, 64), raw_tensor("c", 192, 3)]
    assert len(plan(side_by_side).segments) == 1
    apart = [raw_tensor("a", 0, 128), raw_tensor("b", 192, 64)]
    assert len(plan(apart).segments) == 2
    two_files = [raw_tensor("a", 0, 64), raw_tensor("b", 64, 64, MemoryFile("x", SOURCE.data))]
    assert len(plan(two_files).segments) == 2


def test_the_fingerprint_follows_the_source() -> None:
    def fingerprint(data: bytes, chunk_bytes: int = 4096) -> str:
        return plan([raw_tensor("a", 0, 4, MemoryFile("f", data))]).fingerprint(chunk_bytes)

    assert fingerprint(b"same") == fingerprint(b"same")
    assert fingerprint(b"same") != fingerprint(b"Same")
    assert fingerprint(b"same") != fingerprint(b"same", 8192)
