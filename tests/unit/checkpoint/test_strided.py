"""Views in row-major order: against a loop over every element."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from serverlessllm.checkpoint.sources import strided
from serverlessllm.checkpoint.sources.base import MemoryFile
from serverlessllm.checkpoint.sources.strided import (
    Bands,
    StridedFile,
    is_contiguous,
    overlaps,
    span,
)


def row_major(data: bytes, item: int, offset: int, shape: list[int], strides: list[int]) -> bytes:
    found = []
    for index in itertools.product(*map(range, shape)):
        at = offset + sum(n * stride for n, stride in zip(index, strides, strict=True))
        found.append(data[at * item : (at + 1) * item])
    return b"".join(found)


def view_of(
    data: bytes, item: int, offset: int, shape: list[int], strides: list[int]
) -> StridedFile:
    return StridedFile(
        name="view",
        storage=MemoryFile("storage", data),
        item_bytes=item,
        offset=offset,
        shape=tuple(shape),
        strides=tuple(strides),
        bands=Bands(),
    )


axes = st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0, 1, 2, 3, 5, 8, 20])), max_size=4)
small = st.sampled_from([8, 16, 24, 64, 1 << 20])


@settings(deadline=None, max_examples=300)
@given(axes, st.sampled_from([1, 2, 4, 8]), st.integers(0, 7), small, small, small, st.data())
def test_any_view_in_any_pieces(
    axes: list[tuple[int, int]],
    item: int,
    offset: int,
    band: int,
    window: int,
    gap: int,
    data: st.DataObject,
) -> None:
    shape, strides = [n for n, _ in axes], [stride for _, stride in axes]
    last = offset + sum((n - 1) * stride for n, stride in axes)
    stored = random.Random(last).randbytes((last + 1) * item)
    expected = row_major(stored, item, offset, shape, strides)
    with (
        patch.object(strided, "BAND_BYTES_MAX", band),
        patch.object(strided, "WINDOW_BYTES_MAX", window),
        patch.object(strided, "GAP_BYTES_MAX", gap - 8),
        patch.object(strided, "_LINE_MIN", 2),
        patch.object(strided, "_TILE", 3),
    ):
        view = view_of(stored, item, offset, shape, strides)
        assert view.size_bytes == len(expected)
        start = data.draw(st.integers(0, len(expected)))
        stop = data.draw(st.integers(start, len(expected)))
        for first, end in ((start, stop), (0, len(expected))):
            found = bytearray(end - first)
            view.read_into(first, memoryview(found))
            assert found == expected[first:end]


def test_a_transpose_over_several_bands_and_windows() -> None:
    rows, columns = 700, 900
    stored = random.Random(1).randbytes(rows * columns * 2)
    with (
        patch.object(strided, "BAND_BYTES_MAX", 100_000),
        patch.object(strided, "WINDOW_BYTES_MAX", 50_000),
    ):
        view = view_of(stored, 2, 0, [columns, rows], [1, columns])
        found = bytearray(view.size_bytes)
        for start in range(0, len(found), 77_777):
            view.read_into(start, memoryview(found)[start : start + 77_777])
    assert found == row_major(stored, 2, 0, [columns, rows], [1, columns])


def test_only_as_much_memory_as_a_few_bands() -> None:
    """A gigabyte is described; a hundred bands of it are read."""
    view = view_of(b"ab", 2, 0, [1 << 29], [0])
    found = bytearray(6)
    with patch.object(strided, "BAND_BYTES_MAX", 1 << 16):
        tracemalloc.start()
        for number in range(1, 100):
            view.read_into((1 << 30) - (number << 16), memoryview(found))
            assert found == b"ababab"
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10 << 16


def test_what_is_contiguous() -> None:
    assert is_contiguous((2, 3), (3, 1))
    assert is_contiguous((2, 1, 3), (3, 99, 1))
    assert is_contiguous((), ())
    assert is_contiguous((0, 4), (1, 7))
    assert not is_contiguous((2, 3), (1, 2))
    assert not is_contiguous((2, 3), (4, 1))
    assert not is_contiguous((3,), (0,))


@given(axes)
def test_what_overlaps(axes: list[tuple[int, int]]) -> None:
    """Never said of a view whose elements are apart, but for those that are expanded."""
    shape, strides = tuple(n for n, _ in axes), tuple(stride for _, stride in axes)
    moving = [(n, stride) for n, stride in axes if n > 1 and stride]
    places = [
        sum(index * stride for index, (_, stride) in zip(indices, moving, strict=True))
        for indices in itertools.product(*(range(n) for n, _ in moving))
    ]
    assert span(shape, strides) == max(places) + 1
    if len(set(places)) < len(places):
        assert overlaps(shape, strides)


def test_slices_and_transposes_do_not_overlap() -> None:
    for shape, strides in (
        ((3, 4), (4, 1)),
        ((4, 3), (1, 4)),
        ((3, 2), (8, 2)),
        ((6, 5), (0, 1)),
        ((2, 3, 4), (1, 2, 6)),
        ((5,), (6,)),
        ((), ()),
    ):
        assert not overlaps(shape, strides)
    assert overlaps((3, 3), (1, 1))
    assert overlaps((3, 2), (1, 2))
