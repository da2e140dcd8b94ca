"""Views that do not lie in their own order: transposed, sliced, expanded; read row-major.

A view is cut into bands of rows; a band is put together in memory when it is asked for, and kept
while others are not. Its source is read in runs as long as its strides allow. Elements move
by extended slices of arrays, up to 1,024 at a time: a transpose of BF16 runs at about 0.3 GB/s.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from threading import Lock
from typing import Final, NamedTuple, TypeAlias

import msgspec

from serverlessllm.checkpoint.sources.base import RawFile
from serverlessllm.core.units import KIB, MIB

BAND_BYTES_MAX: Final = 32 * MIB
BANDS_MAX: Final = 3
"""As many as a writer's threads may be reading at once, of one view or of several."""
WINDOW_BYTES_MAX: Final = 8 * MIB
"""Of source bytes that are read at once and picked from."""
GAP_BYTES_MAX: Final = 32 * KIB
"""Between two runs of a source: reading over it is cheaper than a second read."""
_TILE = 1024
"""Elements of a slice of a transpose: its lines stay in the cache for the slices beside it."""
_LINE_MIN = 128
_TYPES = {1: "B", 2: "H", 4: "I", 8: "Q"}

Elements: TypeAlias = "array[int]"
"""Elements of a tensor by their size alone."""


class Axis(NamedTuple):
    """One dimension of a copy, in elements."""

    length: int
    source: int
    """Stride in the storage."""
    target: int
    """Stride in the row-major tensor."""


class Bands:
    """The bands that are in memory, of whichever views are being read. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int], memoryview] = OrderedDict()

    def get(self, view: str, number: int, make: Callable[[], memoryview]) -> memoryview:
        """A band of the view of that name, made now if it is not here."""
        key = (view, number)
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= BANDS_MAX:  # before the new one takes its memory
                    self._kept.popitem(last=False)
                self._kept[key] = make()
            self._kept.move_to_end(key)
            return self._kept[key]


class StridedFile(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A `RawFile` that is a view of `storage`, in row-major order.

    The view has been checked: every element lies in the storage.
    """

    name: str
    storage: RawFile
    item_bytes: int
    offset: int
    """In elements, as are the strides."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    bands: Bands

    @property
    def size_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.item_bytes

    @property
    def version(self) -> str:
        """As `RawFile.version`: the storage's, and which view of it this is."""
        return f"{self.storage.version}:{self.offset}:{self.shape}:{self.strides}"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `RawFile.read_into`."""
        end, position = offset + len(buffer), offset
        band_bytes = BAND_BYTES_MAX // self.item_bytes * self.item_bytes
        while position < end:
            number = position // band_bytes
            start = number * band_bytes
            size = min(band_bytes, self.size_bytes - start)
            band = self.bands.get(self.name, number, partial(self._band, start, size))
            stop = min(end, start + size)
            buffer[position - offset : stop - offset] = band[position - start : stop - start]
            position = stop

    def _band(self, start: int, size: int) -> memoryview:
        return memoryview(self._gather(start // self.item_bytes, size // self.item_bytes)).cast("B")

    def _gather(self, first: int, count: int) -> Elements:
        """The elements from number `first` on, in row-major order."""
        target = self._zeros(count)
        for source, start, axes in boxes(merged(self.shape, self.strides), first, count):
            self._read_box(self.offset + source, target, start, axes)
        return target

    def _zeros(self, count: int) -> Elements:
        return array(_TYPES[self.item_bytes], bytes(self.item_bytes)) * count

    def _read_box(self, source: int, target: Elements, start: int, axes: list[Axis]) -> None:
        """Read what a box spans at once, or in pieces along its widest axis.

        `axes` are longer than 1 and sorted by their stride in the source.
        """
        room = WINDOW_BYTES_MAX // self.item_bytes
        inner, span = _span(axes[:-1]), _span(axes)
        widest = axes[-1] if axes else Axis(1, 0, 0)
        apart = (widest.source - inner) * self.item_bytes > GAP_BYTES_MAX
        if not apart and span <= room:
            self._copy(source, span, target, start, axes)
            return
        step = 1 if apart or inner > room else (room - inner) // widest.source + 1
        for number in range(0, widest.length, step):
            count = min(step, widest.length - number)
            piece = [widest._replace(length=count)] if count > 1 else []
            self._read_box(
                source + number * widest.source,
                target,
                start + number * widest.target,
                [*axes[:-1], *piece],
            )

    def _copy(self, source: int, span: int, target: Elements, start: int, axes: list[Axis]) -> None:
        window = self._zeros(span)
        self.storage.read_into(source * self.item_bytes, memoryview(window).cast("B"))
        line, loops = _split(axes)
        tile = _TILE if loops else line.length
        for row in range(0, line.length, tile):
            count = min(tile, line.length - row)
            for steps in product(*(range(axis.length) for axis in loops)):
                at, to = row * line.source, start + row * line.target
                for number, axis in zip(steps, loops, strict=True):
                    at += number * axis.source
                    to += number * axis.target
                if line.source:
                    items = window[at : at + (count - 1) * line.source + 1 : line.source]
                else:
                    items = window[at : at + 1] * count
                target[to : to + (count - 1) * line.target + 1 : line.target] = items


def _split(axes: list[Axis]) -> tuple[Axis, list[Axis]]:
    """The axis to move at a time, and those to loop over, the closest in the target innermost."""
    if not axes:
        return Axis(1, 1, 1), []
    lines = [axis for axis in axes if axis.target == 1 and axis.length >= _LINE_MIN]
    line = lines[0] if lines else max(axes, key=lambda axis: axis.length)
    loops = sorted((axis for axis in axes if axis is not line), key=lambda axis: -axis.target)
    return line, loops


def _span(axes: list[Axis]) -> int:
    return 1 + sum((axis.length - 1) * axis.source for axis in axes)


def merged(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[Axis]:
    """The axes of a view, those that lie behind each other as one, those of length 1 left out."""
    axes: list[Axis] = []
    target = math.prod(shape)
    for count, source in zip(shape, strides, strict=True):
        if count == 1:
            continue
        target //= count
        last = axes[-1] if axes else None
        if last is not None and last.source == count * source:
            axes[-1] = Axis(last.length * count, source, target)
        else:
            axes.append(Axis(count, source, target))
    return axes


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a view that is not empty, with those between."""
    return _span(merged(shape, strides))


def overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether indices lead to one element that differ in more than an expanded dimension.

    No slice, transpose or expansion of a tensor does; and a read of such a view, element by
    element, could go on for as long as its author likes.
    """
    reach = 1
    for axis in sorted(merged(shape, strides), key=lambda axis: axis.source):
        if 0 < axis.source < reach:
            return True
        reach += (axis.length - 1) * axis.source
    return False


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements of a view lie in row-major order, without gaps."""
    if 0 in shape:
        return True
    axes = merged(shape, strides)
    return not axes or (len(axes) == 1 and axes[0].source == 1)


def boxes(axes: list[Axis], first: int, count: int) -> Iterator[tuple[int, int, list[Axis]]]:
    """Cut a range of row-major elements into boxes: offset in the source, in the range, axes."""
    if count <= 0:
        return
    if not axes:
        yield 0, 0, []
        return
    axis, rest = axes[0], axes[1:]
    size = axis.target
    low, high = -(-first // size), (first + count) // size
    if low > high:  # within one row
        row = high
        for source, target, inner in boxes(rest, first - row * size, count):
            yield row * axis.source + source, target, inner
        return
    for source, target, inner in boxes(rest, first - (low - 1) * size, low * size - first):
        yield (low - 1) * axis.source + source, target, inner
    if high > low:
        body = [axis._replace(length=high - low), *rest]
        whole = sorted((a for a in body if a.length > 1), key=lambda a: a.source)
        yield low * axis.source, low * size - first, whole
    for source, target, inner in boxes(rest, 0, first + count - high * size):
        yield high * axis.source + source, high * size - first + target, inner
