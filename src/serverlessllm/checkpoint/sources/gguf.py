"""GGUF: a header of our own reading; the file itself becomes the `.bin`, byte for byte.

The file is `GGUF | u32 version | u64 tensors | u64 metadata pairs | metadata | tensor table |
padding | data`, little-endian. Values are skipped, not built, but for the few that are wanted, so
a header costs the memory of one window however long it says its arrays are.
"""

from __future__ import annotations

import struct

import msgspec

from serverlessllm.checkpoint.bounds import (
    ALIGNMENT_BYTES_MAX,
    check_count,
    check_spans,
    check_text,
    is_power_of_two,
)
from serverlessllm.checkpoint.dtypes import GGML_TYPES, tensor_size_bytes
from serverlessllm.checkpoint.index import KIND_GGUF, Tensor
from serverlessllm.checkpoint.layout import Layout, Segment
from serverlessllm.checkpoint.sources.base import RawFile, read_at
from serverlessllm.checkpoint.sources.pick import SPLIT_GGUF
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.core.units import MIB

HEADER_BYTES_MAX = 64 * MIB
PAIRS_MAX = 65_536
STRINGS_MAX = 2_000_000
"""Elements of all string arrays together: tokens, their merges. The most in the wild: 800,000."""
WANTED_TEXT_BYTES_MAX = 4096

_WINDOW_BYTES = 256 * 1024
_DIMS_MAX = 4
_ALIGNMENT_DEFAULT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_WANTED = frozenset({"general.architecture", "general.license", "general.alignment", "split.count"})


class _Cursor:
    """Reads forward through a header, a window at a time, never past its bounds."""

    def __init__(self, file: RawFile) -> None:
        self._file = file
        self._end = min(file.size_bytes, HEADER_BYTES_MAX)
        self._window = b""
        self._window_start = 0
        self._strings_left = STRINGS_MAX
        self.position = 0

    def skip(self, size: int) -> None:
        if size > self._end - self.position:
            raise CheckpointError(f"{self._file.name}: the header ends too early, or is too long")
        self.position += size

    def bytes(self, size: int) -> bytes:
        start = self.position
        self.skip(size)
        if start + size > self._window_start + len(self._window):
            length = min(max(size, _WINDOW_BYTES), self._end - start)
            self._window, self._window_start = read_at(self._file, start, length), start
        begin = start - self._window_start
        return self._window[begin : begin + size]

    def number(self, code: str) -> int:
        (value,) = struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))
        return int(value)

    def text(self, limit: int) -> str:
        size = self.number("Q")
        if size > limit:
            raise CheckpointError(f"{self._file.name}: a text of {size} bytes, more than {limit}")
        try:
            return self.bytes(size).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self._file.name}: a text is not UTF-8") from None

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self._skip_array()
        else:
            self.skip(self._scalar_size(kind))

    def _skip_array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind == _ARRAY:
            raise CheckpointError(f"{self._file.name}: an array of arrays")
        if kind != _STRING:
            self.skip(count * self._scalar_size(kind))
            return
        self._strings_left -= count
        if self._strings_left < 0:
            raise CheckpointError(f"{self._file.name}: more than {STRINGS_MAX} texts in arrays")
        for _ in range(count):
            self.skip(int.from_bytes(self.bytes(8), "little"))

    def _scalar_size(self, kind: int) -> int:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._file.name}: unknown type {kind} of a metadata value")
        return struct.calcsize("<" + _SCALARS[kind])

    def value(self, kind: int) -> str | int | None:
        """A text or a whole number; None, skipped, for anything else."""
        if kind == _STRING:
            return self.text(WANTED_TEXT_BYTES_MAX)
        if kind == _ARRAY or _SCALARS.get(kind, "f") in "fd?":
            self.skip_value(kind)
            return None
        return self.number(_SCALARS[kind])


class GGUFHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a GGUF says of itself; tensors sorted by their offset in the file."""

    architecture: str | None
    license: str | None
    alignment_bytes: int
    tensors: tuple[Tensor, ...]


def read_header(file: RawFile) -> GGUFHeader:
    """Read and check the header of a GGUF, version 2 or 3.

    Raises:
        CheckpointError: not a GGUF, or its header lies about anything.
        UnsupportedCheckpoint: version 1, big-endian, or a piece of a split file.
    """
    cursor = _Cursor(file)
    if cursor.bytes(4) != b"GGUF":
        raise CheckpointError(f"{file.name}: not a GGUF file")
    _check_version(file, cursor.number("I"))
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    check_count(tensors, f"tensors in {file.name}")
    check_count(pairs, f"metadata pairs in {file.name}", PAIRS_MAX)
    wanted = _read_metadata(file, cursor, pairs)
    if (wanted.get("split.count") or 0) not in {0, 1}:
        raise UnsupportedCheckpoint(SPLIT_GGUF.format(file.name))
    alignment = wanted.get("general.alignment", _ALIGNMENT_DEFAULT)
    if (
        not isinstance(alignment, int)
        or not is_power_of_two(alignment)
        or alignment > ALIGNMENT_BYTES_MAX
    ):
        raise CheckpointError(f"{file.name}: alignment {alignment!r} is not a power of two")
    return GGUFHeader(
        architecture=_text(file, wanted, "general.architecture"),
        license=_text(file, wanted, "general.license"),
        alignment_bytes=alignment,
        tensors=_read_table(file, cursor, tensors, alignment),
    )


def _check_version(file: RawFile, version: int) -> None:
    if version in {2, 3}:
        return
    if version & 0xFFFF == 0 and version:
        raise UnsupportedCheckpoint(f"{file.name}: a big-endian GGUF; convert it to little-endian")
    raise UnsupportedCheckpoint(
        f"{file.name}: GGUF version {version}, but this program reads 2 and 3: convert it again "
        "with a current llama.cpp"
    )


def _read_metadata(file: RawFile, cursor: _Cursor, pairs: int) -> dict[str, str | int | None]:
    seen: set[str] = set()
    wanted: dict[str, str | int | None] = {}
    for _ in range(pairs):
        key = cursor.text(512)
        check_text(key, f"{file.name}: metadata key")
        if key in seen:
            raise CheckpointError(f"{file.name}: metadata key {key!r} occurs twice")
        seen.add(key)
        kind = cursor.number("I")
        if key in _WANTED:
            wanted[key] = cursor.value(kind)
        else:
            cursor.skip_value(kind)
    return wanted


def _text(file: RawFile, wanted: dict[str, str | int | None], key: str) -> str | None:
    value = wanted.get(key)
    if value is None or value == "":
        return None
    text = str(value)
    check_text(text, f"{file.name}: {key}")
    return text


def _read_table(file: RawFile, cursor: _Cursor, count: int, alignment: int) -> tuple[Tensor, ...]:
    """The tensors with offsets from the start of the file, sorted by them."""
    rows = [_read_row(file, cursor) for _ in range(count)]
    if len({row.name for row in rows}) != len(rows):
        raise CheckpointError(f"{file.name}: a tensor's name occurs twice")
    start = -(-cursor.position // alignment) * alignment
    tensors = [msgspec.structs.replace(row, offset=start + row.offset) for row in rows]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    try:
        check_spans(((t.name, t.offset, t.size_bytes) for t in tensors), file.size_bytes, alignment)
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: {error.message}") from None
    return tuple(tensors)


def _read_row(file: RawFile, cursor: _Cursor) -> Tensor:
    name = cursor.text(512)
    check_text(name, f"{file.name}: tensor name")
    dims = cursor.number("I")
    if dims > _DIMS_MAX:
        raise CheckpointError(f"{file.name}: tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
    number = cursor.number("I")
    offset = cursor.number("Q")
    if number not in GGML_TYPES:
        raise CheckpointError(f"{file.name}: tensor {name!r} has unknown type {number}")
    dtype = GGML_TYPES[number][0]
    try:
        size = tensor_size_bytes(KIND_GGUF, dtype, shape)
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: tensor {name!r}: {error.message}") from None
    return Tensor(name=name, dtype=dtype, shape=shape, offset=offset, size_bytes=size)


def gguf_layout(file: RawFile) -> Layout:
    """Plan the `.bin` of a GGUF: the file itself."""
    header = read_header(file)
    if not header.tensors:
        raise CheckpointError(f"{file.name}: it has no tensors")
    return Layout(
        kind=KIND_GGUF,
        size_bytes=file.size_bytes,
        alignment_bytes=header.alignment_bytes,
        segments=(Segment(offset=0, size_bytes=file.size_bytes, file=file, source_offset=0),),
        tensors=header.tensors,
        architecture=header.architecture,
        license=header.license,
    )
