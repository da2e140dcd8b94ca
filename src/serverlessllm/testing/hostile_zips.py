"""Archives that pose as files of `torch.save`, one lie each."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.testing.torch_files import ZipEntry, end_of_zip64, torch_zip, zip_of

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


class HostileArchive(NamedTuple):
    """A file that must be refused by an `error`."""

    name: str
    data: bytes
    error: type[CheckpointError]


def hostile_archives(pickle: bytes) -> Iterator[HostileArchive]:
    """Archives of a good `pickle` that takes 16 bytes of storage `0`."""
    for name, data in _layouts(pickle).items():
        yield HostileArchive(name, data, UnsupportedCheckpoint)
    for table in (_entries(pickle), _ends(pickle), _names(pickle)):
        for name, data in table.items():
            yield HostileArchive(name, data, CheckpointError)


def _layouts(pickle: bytes) -> dict[str, bytes]:
    """What PyTorch writes or wrote, and is not read."""
    script = [
        ZipEntry(name=b"m/code/__torch__.py", data=b"import os"),
        ZipEntry(name=b"m/constants.pkl", data=b"\x80\x02)."),
    ]
    return {
        "a legacy file": _LEGACY,
        "a legacy tar": b"storages".ljust(257, b"\0") + b"ustar\0" + bytes(500),
        "a plain pickle": pickle,
        "a plain pickle that runs": b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
        "a TorchScript": torch_zip(pickle, more=script),
        "a compressed TorchScript": torch_zip(
            pickle,
            more=[ZipEntry(name=b"m/code/a.py", local={"method": 8}, central={"method": 8})],
        ),
        "big-endian": torch_zip(pickle, byte_order=b"big"),
        "an unknown byte order": torch_zip(pickle, byte_order=b"middle"),
    }


def _with(pickle: bytes, *, first: ZipEntry | None = None, second: ZipEntry | None = None) -> bytes:
    """A good archive, with one of its two entries replaced."""
    return zip_of(
        [
            first or ZipEntry(name=b"m/data.pkl", data=pickle),
            second or ZipEntry(name=b"m/data/0", data=bytes(16)),
        ]
    )


def _storage(**lies: dict[str, int | bytes] | bytes) -> ZipEntry:
    entry = ZipEntry(name=b"m/data/0", data=bytes(16))
    for name, value in lies.items():
        setattr(entry, name, value)
    return entry


def _wide(*values: int) -> bytes:
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def _entries(pickle: bytes) -> dict[str, bytes]:
    """Headers of one entry that lie."""
    size = len(pickle)
    both: dict[str, dict[str, int | bytes]] = {
        "compressed": {"method": 8},
        "compressed in another way": {"method": 99},
        "encrypted": {"flags": 1},
        "encrypted strongly": {"flags": 1 | 1 << 6},
        "patched": {"flags": 1 << 5},
        "with a masked header": {"flags": 1 << 13},
    }
    central: dict[str, dict[str, int | bytes]] = {
        "a link": {"attributes": 0o120777 << 16},
        "a folder": {"attributes": 0o040755 << 16},
        "a device": {"attributes": 0o020644 << 16},
        "a pipe": {"attributes": 0o010644 << 16},
        "on another disk": {"disk": 1},
        "with a comment": {"comment": b"x"},
        "longer than it is": {"full": 17, "stored": 17},
        "shorter than it is": {"full": 15, "stored": 15},
        "empty by the directory": {"full": 0, "stored": 0},
        "a bomb of 4 GiB": {"full": 0xFFFFFFFE, "stored": 16},
        "of a size that is not there": {"full": 0xFFFFFFFE, "stored": 0xFFFFFFFE},
        "of 64 bits that are not there": {"full": 0xFFFFFFFF, "stored": 0xFFFFFFFF},
        "of 64 bits": {"full": 0xFFFFFFFF, "stored": 0xFFFFFFFF, "extra": _wide(1 << 62, 1 << 62)},
        "of 16 EiB": {
            "full": 0xFFFFFFFF,
            "stored": 0xFFFFFFFF,
            "extra": _wide(2**64 - 1, 2**64 - 1),
        },
        "of 64 bits that nobody asked for": {"extra": _wide(16, 16)},
        "of 64 bits twice": {
            "full": 0xFFFFFFFF,
            "stored": 0xFFFFFFFF,
            "extra": _wide(16, 16) + _wide(17, 17),
        },
        "with a cut extra field": {"extra": b"\x01\x00\xff"},
        "with an extra field that is too long": {"extra": b"\x01\x00\xff\xff"},
        "at the place of the pickle": {"offset": 0},
        "inside of the pickle": {"offset": 8},
        "behind the end": {"offset": 0xFFFFFFFE},
        "with a descriptor that is not there": {"flags": 8},
        "of another name by the directory": {"name": b"m/data/1"},
    }
    local: dict[str, dict[str, int | bytes]] = {
        "of another name by its header": {"name": b"m/data/1"},
        "of a longer name by its header": {"name": b"m/data/00"},
        "of another size by its header": {"full": 15, "stored": 15},
        "of 64 bits by its header": {"full": 0xFFFFFFFF, "stored": 0xFFFFFFFF},
        "of another sum by its header": {"crc32": 1},
        "compressed by its header": {"method": 8},
        "encrypted by its header": {"flags": 1},
        "described by its header": {"flags": 8},
    }
    found = {
        f"an entry, {what}": _with(pickle, second=_storage(local=lie, central=lie))
        for what, lie in both.items()
    }
    found |= {
        f"an entry, {what}": _with(pickle, second=_storage(central=lie))
        for what, lie in central.items()
    }
    found |= {
        f"an entry, {what}": _with(pickle, second=_storage(local=lie))
        for what, lie in local.items()
    }
    huge = ZipEntry(name=b"m/data.pkl", data=pickle, central={"full": size + 9, "stored": size + 9})
    return found | {
        "a descriptor without its flag": _with(pickle, second=_storage(descriptor=bytes(16))),
        "a header by another signature": _with(pickle).replace(b"PK\x03\x04", b"PK\x03\x05", 2),
        "a pickle that reaches into a storage": _with(pickle, first=huge),
        "bytes between two entries": _with(
            pickle, first=ZipEntry(name=b"m/data.pkl", data=pickle, padding=bytes(8000))
        ),
        "bytes before the directory": _with(pickle, second=_storage(padding=bytes(8000))),
        "an entry twice": torch_zip(pickle, more=[_storage()]),
        "a pickle twice": torch_zip(pickle, more=[ZipEntry(name=b"m/data.pkl", data=pickle)]),
    }


def _ends(pickle: bytes) -> dict[str, bytes]:
    """Directories that lie, and files that are not whole."""
    entries = [
        ZipEntry(name=b"m/data.pkl", data=pickle),
        ZipEntry(name=b"m/data/0", data=bytes(16)),
    ]
    good = zip_of(entries)
    offset = good.rindex(b"PK\x01\x02", 0, good.rindex(b"PK\x01\x02"))
    size = len(good) - 22 - offset

    def wide(count: int, size_: int, offset_: int, position: int | None = None) -> bytes:
        return end_of_zip64(count, size_, offset_, position=position)

    lies: Sequence[tuple[str, dict[str, int | bytes]]] = (
        ("more entries than there are", {"count": 3, "here": 3}),
        ("fewer entries than there are", {"count": 1, "here": 1}),
        ("no entries", {"count": 0, "here": 0}),
        ("65,535 entries", {"count": 0xFFFF, "here": 0xFFFF}),
        ("entries on another disk", {"here": 1}),
        ("a disk", {"disk": 1}),
        ("a directory that is longer", {"size": size + 1}),
        ("a directory of 4 GiB", {"size": 0xFFFFFFFF}),
        ("a directory elsewhere", {"offset": offset - 1}),
        ("a directory behind the end", {"offset": 0xFFFFFFFE}),
        ("a comment", {"comment": b"hello"}),
        ("a huge comment", {"comment": b"x" * 0xFFFF}),
        ("a comment with another end", {"comment": good[-22:]}),
        ("two ends", {"after": good[-22:]}),
        ("bytes after the end", {"after": b"\0"}),
        ("two directories", {"after": good[offset:]}),
        ("a 64-bit end elsewhere", {"before": wide(2, size, offset, 4)}),
        ("a 64-bit end of 2^40 entries", {"before": wide(1 << 40, size, offset)}),
        (
            "a 64-bit end of 3 entries",
            {"before": wide(3, size, offset), "count": 0xFFFF, "here": 0xFFFF},
        ),
        ("a 64-bit end that contradicts", {"before": wide(2, size, offset), "offset": 4}),
        ("a 64-bit end of 16 EiB", {"before": wide(2, 2**64 - 1, 2**64 - 1)}),
        ("a 64-bit end without its record", {"before": wide(2, size, offset)[56:]}),
    )
    found = {f"an end with {what}": zip_of(entries, end=lie) for what, lie in lies}
    found |= {f"cut to {part} bytes": good[:part] for part in (4, 21, 40, len(good) // 2)}
    found |= {f"cut by {part} bytes": good[:-part] for part in (1, 4, 22)}
    return found | {
        "bytes before the first entry": zip_of(entries, start=16),
        "a program before the first entry": b"#!/bin/sh\n" + good,
        "only an end": good[-22:].replace(good[-14:], bytes(14)),
        "40,001 entries": zip_of(
            [*entries, *(ZipEntry(name=b"m/data/%d" % n) for n in range(1, 40_000))]
        ),
        "no pickle": zip_of(entries[1:]),
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a web page": b"<!DOCTYPE html><html>Not found</html>",
        "zeros": bytes(4096),
    }


def _names(pickle: bytes) -> dict[str, bytes]:
    """Names of entries that no file of `torch.save` has."""
    names = {
        "above its folder": b"m/../evil",
        "above everything": b"../../evil",
        "absolute": b"/etc/passwd",
        "with a drive": b"C:\\evil",
        "with backslashes": b"m\\..\\evil",
        "with a NUL": b"m/data/1\0",
        "that is empty": b"",
        "of a folder": b"m/data/",
        "without a root": b"evil",
        "of another root": b"n/data/1",
        "of a deeper pickle": b"m/m/data.pkl",
        "of another pickle": b"m/evil.pkl",
        "of code": b"m/evil.py",
        "that is not UTF-8": b"m/\xff",
        "of a storage without a number": b"m/data/evil",
        "of a storage with zeros": b"m/data/01",
        "of a negative storage": b"m/data/-1",
        "of an arabic digit": "m/data/\u0661".encode(),
        "in another case": b"m/DATA.PKL",
        "of 65,535 bytes": b"m/" + b"a" * 0xFFFD,
        "with dots as its root": b"../data/1",
    }
    return {
        f"a name {what}": torch_zip(pickle, more=[ZipEntry(name=name, data=b"evil")])
        for what, name in names.items()
    } | {
        "a root that acts on a terminal": zip_of([ZipEntry(name=b"\x1b[2J/data.pkl", data=pickle)]),
        "a root of dots": zip_of([ZipEntry(name=b"../data.pkl", data=pickle)]),
    }
