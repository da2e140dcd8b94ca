"""The zip files that `torch.save` writes: a directory of plain entries, each in its place.

Zip is a format whose readers disagree, so only the one shape that PyTorch writes is taken: stored
entries (no compression, no encryption) that fill the file without gap or overlap, from its first
byte to the directory at its end, with names by pattern under one root. Reference: PKWARE's
APPNOTE.TXT, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import msgspec

from serverlessllm.checkpoint.bounds import check_count
from serverlessllm.checkpoint.sources.base import RawFile, read_at
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.core.units import MIB

ENTRIES_MAX: Final = 40_000
DIRECTORY_BYTES_MAX: Final = 8 * MIB
LOCAL_BYTES_MAX: Final = 4096
"""A local header with its name and its padding to 64 bytes."""
WAY_OUT: Final = (
    "where you trust the file, write its tensors with `safetensors.torch.save_file` and convert "
    "that"
)

_PLAIN = frozenset(
    {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment"}
    | {".data/serialization_id"}
)
_STORAGE = re.compile(r"data/(0|[1-9][0-9]{0,8})")
_ROOT = re.compile(r"[^/\\\0]{1,200}")
_SCRIPT = re.compile(rb"constants\.pkl|code/.*|constants/.*|extra/.*|bytecode\.pkl", re.DOTALL)

_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), "<4sLQL"
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_LOCATOR = struct.Struct(_LOCATOR64)
_ENCRYPTED, _DESCRIBED, _UTF8 = 1 << 0, 1 << 3, 1 << 11
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ZIP64_EXTRA = 1


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an archive, by the directory at its end."""

    name: str
    """Without the root's folder."""
    full_name: bytes
    start: int
    """Of its local header."""
    offset: int
    """Of its bytes."""
    size_bytes: int
    flags: int
    crc32: int


class Directory(msgspec.Struct, frozen=True, kw_only=True):
    """What is in an archive, and where."""

    entries: dict[str, Entry]

    @property
    def pickle(self) -> Entry:
        """`data.pkl`."""
        return self.entries["data.pkl"]

    def storage(self, key: str) -> Entry | None:
        """`data/<key>`, if the archive has it."""
        return self.entries.get(f"data/{key}") if _STORAGE.fullmatch(f"data/{key}") else None


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the central directory."""

    name: bytes
    start: int
    size_bytes: int
    flags: int
    crc32: int
    is_large: bool
    """Has 64-bit fields, and so a longer descriptor behind its bytes."""


def read_directory(file: RawFile) -> Directory:
    """Read and check the directory of a file of `torch.save`. Reads no tensor and no local header.

    Raises:
        UnsupportedCheckpoint: a layout of PyTorch's that is not read; says which, and the way out.
        CheckpointError: not such a file, or its directory lies about anything.
    """
    try:
        _check_kind(file)
        count, start, size = _find_directory(file)
        records = sorted(_records(file, count, start, size), key=lambda record: record.start)
        entries = _entries(records, start)
    except CheckpointError as error:
        raise type(error)(f"{file.name}: {error.message}") from None
    return Directory(entries=entries)


def _check_kind(file: RawFile) -> None:
    head = read_at(file, 0, min(file.size_bytes, 512))
    if head.startswith(b"PK\x03\x04"):
        return
    if head[:2] == b"\x80\x02" and b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19" in head[:16]:
        raise UnsupportedCheckpoint(
            "written by PyTorch before 1.6, or with `_use_new_zipfile_serialization=False`: load "
            "it and save it again with a current `torch.save`, or " + WAY_OUT
        )
    if head[257:262] == b"ustar":
        raise UnsupportedCheckpoint(f"the tar layout of PyTorch before 0.1.10: {WAY_OUT}")
    if head[:1] == b"\x80":
        raise UnsupportedCheckpoint(f"a plain pickle, not a file of `torch.save`: {WAY_OUT}")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError("a pointer of Git LFS, not the file: fetch it with `git lfs pull`")
    raise CheckpointError("not a file of `torch.save`")


def _find_directory(file: RawFile) -> tuple[int, int, int]:
    """Number of entries, offset and size of the directory, from the records at the very end."""
    tail_bytes = min(file.size_bytes, _END64.size + _LOCATOR.size + _END.size)
    tail = read_at(file, file.size_bytes - tail_bytes, tail_bytes)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise CheckpointError("no end of a zip directory at its end: cut off, or with a comment")
    fields = _END.unpack(tail[-_END.size :])
    _, disk, first_disk, count_here, count, size, start, comment = fields
    end = file.size_bytes - _END.size
    if comment or disk or first_disk or count_here != count:
        raise CheckpointError("a zip file in several parts, or with a comment")
    if tail[-_END.size - _LOCATOR.size :][:4] == b"PK\x06\x07":
        end -= _LOCATOR.size + _END64.size
        count64, size64, start64 = _find_directory64(tail, end)
        for short, full, long in (
            (count, _FULL16, count64),
            (size, _FULL32, size64),
            (start, _FULL32, start64),
        ):
            if short not in {full, long}:
                raise CheckpointError("the two ends of its zip directory contradict each other")
        count, size, start = count64, size64, start64
    if start + size != end:
        raise CheckpointError(f"its zip directory is not right before its end, at byte {end}")
    check_count(count, "entries", ENTRIES_MAX)
    if size > DIRECTORY_BYTES_MAX:
        raise CheckpointError(f"a zip directory of {size} bytes, more than {DIRECTORY_BYTES_MAX}")
    return count, start, size


def _find_directory64(tail: bytes, end: int) -> tuple[int, int, int]:
    if end < 0:
        raise CheckpointError("its 64-bit zip directory's end does not fit")
    _, disk, position, disks = _LOCATOR.unpack(tail[-_END.size - _LOCATOR.size : -_END.size])
    fields = _END64.unpack(tail[: _END64.size])
    magic, record_bytes, _, _, this_disk, first_disk, count_here, count, size, start = fields
    if (
        magic != b"PK\x06\x06"
        or position != end
        or record_bytes != _END64.size - 12
        or (disk, disks, this_disk, first_disk) != (0, 1, 0, 0)
        or count_here != count
    ):
        raise CheckpointError("its 64-bit zip directory's end is not valid")
    return count, size, start


def _records(file: RawFile, count: int, start: int, size: int) -> Iterator[_Record]:
    data = read_at(file, start, size)
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > size:
            raise CheckpointError("its zip directory is shorter than its number of entries")
        fields = _CENTRAL.unpack_from(data, position)
        magic, _, _, flags, method, _, _, crc32, stored, full, *_ = fields
        name_bytes, extra_bytes, comment_bytes, disk, _, attributes, offset = fields[10:]
        if magic != b"PK\x01\x02":
            raise CheckpointError("a damaged zip directory")
        position += _CENTRAL.size
        name = data[position : position + name_bytes]
        extra = data[position + name_bytes : position + name_bytes + extra_bytes]
        position += name_bytes + extra_bytes + comment_bytes
        if position > size or comment_bytes or disk:
            raise CheckpointError(f"entry {_shown(name)}: damaged, or with a comment")
        _check_plain(name, flags, method, attributes)
        full, stored, offset, is_large = _widened(name, extra, full, stored, offset)
        if full != stored:
            raise CheckpointError(f"entry {_shown(name)}: two sizes, {full} and {stored}")
        yield _Record(
            name=name, start=offset, size_bytes=full, flags=flags, crc32=crc32, is_large=is_large
        )
    if position != size:
        raise CheckpointError("its zip directory is longer than its number of entries")


def _check_plain(name: bytes, flags: int, method: int, attributes: int) -> None:
    if _SCRIPT.fullmatch(name.partition(b"/")[2]):
        raise UnsupportedCheckpoint(
            f"a TorchScript archive, which is a program with weights: {WAY_OUT}"
        )
    if flags & ~(_DESCRIBED | _UTF8):
        raise CheckpointError(f"entry {_shown(name)}: encrypted, or with flags {flags:#x}")
    if method:
        raise CheckpointError(f"entry {_shown(name)}: compressed, which `torch.save` never does")
    kind = attributes >> 16 & 0o170000
    if kind not in {0, 0o100000}:
        raise CheckpointError(f"entry {_shown(name)}: a link, a folder or a device")


def _widened(
    name: bytes, extra: bytes, full: int, stored: int, offset: int
) -> tuple[int, int, int, bool]:
    """Sizes and offset, from the 64-bit extra field where the 32-bit ones say so."""
    wide: bytes | None = None
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == _ZIP64_EXTRA:
            if wide is not None:
                raise CheckpointError(f"entry {_shown(name)}: two 64-bit fields")
            wide = extra[position + 4 : position + 4 + size]
        position += 4 + size
    if position != len(extra):
        raise CheckpointError(f"entry {_shown(name)}: damaged extra fields")
    wanted = (full, stored, offset).count(_FULL32)
    if len(wide or b"") != 8 * wanted:
        raise CheckpointError(f"entry {_shown(name)}: 64-bit fields that do not fit its others")
    numbers = iter(struct.unpack(f"<{wanted}Q", wide or b""))
    full, stored, offset = (
        next(numbers) if number == _FULL32 else number for number in (full, stored, offset)
    )
    return full, stored, offset, wide is not None


def _entries(records: list[_Record], directory_start: int) -> dict[str, Entry]:
    """Each entry ends where the next one begins: what is between is its own, to the byte."""
    if not records:
        raise CheckpointError("an empty zip file")
    if records[0].start != 0:
        raise CheckpointError("bytes before its first entry")
    root = _root(records)
    entries: dict[str, Entry] = {}
    ends = [after.start for _, after in pairwise(records)] + [directory_start]
    for record, end in zip(records, ends, strict=True):
        name = record.name[len(root) + 1 :].decode()
        described = record.flags & _DESCRIBED
        descriptor_bytes = (24 if record.is_large else 16) if described else 0
        offset = end - descriptor_bytes - record.size_bytes
        if offset < record.start + _LOCAL.size + len(record.name):
            raise CheckpointError(
                f"entry {_shown(record.name)} overlaps another, or its own header"
            )
        if offset > record.start + LOCAL_BYTES_MAX:
            raise CheckpointError(f"bytes of no entry before entry {_shown(record.name)}'s end")
        if name in entries:
            raise CheckpointError(f"entry {_shown(record.name)} occurs twice")
        entries[name] = Entry(
            name=name,
            full_name=record.name,
            start=record.start,
            offset=offset,
            size_bytes=record.size_bytes,
            flags=record.flags,
            crc32=record.crc32,
        )
    if "data.pkl" not in entries:
        raise CheckpointError("no data.pkl: not a file of `torch.save`")
    return entries


def _root(records: list[_Record]) -> bytes:
    """The one folder that all entries are in. Their names are checked against the patterns."""
    root = records[0].name.partition(b"/")[0]
    for record in records:
        folder, _, rest = record.name.partition(b"/")
        try:
            name = rest.decode()
            valid = folder == root and _ROOT.fullmatch(root.decode()) and root not in {b".", b".."}
        except UnicodeDecodeError:
            valid = None
        if not valid or not root.decode().isprintable():
            raise CheckpointError(
                f"entry {_shown(record.name)}: not a name that `torch.save` gives"
            )
        if name not in _PLAIN and not _STORAGE.fullmatch(name):
            raise CheckpointError(
                f"entry {_shown(record.name)}: not a name that `torch.save` gives"
            )
    return root


def check_local(file: RawFile, entry: Entry) -> None:
    """Check that the header before an entry's bytes says what the directory says.

    Raises:
        CheckpointError: it does not.
    """
    data = read_at(file, entry.start, entry.offset - entry.start)
    magic, _, flags, method, _, _, crc32, stored, full, name_bytes, extra_bytes = (
        _LOCAL.unpack_from(data)
    )
    later = entry.flags & _DESCRIBED  # sizes follow the bytes; before them they may be zeros
    sizes = {min(entry.size_bytes, _FULL32)} | ({0} if later else set())
    if (
        magic != b"PK\x03\x04"
        or flags != entry.flags
        or method
        or _LOCAL.size + name_bytes + extra_bytes != len(data)
        or data[_LOCAL.size : _LOCAL.size + name_bytes] != entry.full_name
        or not {stored, full} <= sizes
        or crc32 not in ({entry.crc32, 0} if later else {entry.crc32})
    ):
        raise CheckpointError(
            f"{file.name}: entry {entry.name} is not what the zip directory says of it"
        )


def _shown(name: bytes) -> str:
    return ascii(name[:100].decode(errors="replace"))
