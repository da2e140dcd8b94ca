"""Files as `torch.save` writes them, made without torch: any part of them can be made to lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int | float | bool | None) -> bytes:
    """The opcode of a number, or of something that is not quite one."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(items: Iterable[bytes]) -> bytes:
    """MARK … TUPLE."""
    return b"(" + b"".join(items) + b"t"


def numbers(values: Sequence[int | float | None]) -> bytes:
    """A tuple of numbers."""
    return tuple_of(map(number, values))


def storage(
    type_: bytes = b"ctorch\nFloatStorage\n", key: bytes = text("0"), elements: bytes = number(4)
) -> bytes:
    """A storage by its persistent id; each part is the opcodes that make it."""
    return tuple_of([text("storage"), type_, key, text("cpu"), elements]) + b"Q"


def tensor(
    stored: bytes = storage(),
    offset: bytes = number(0),
    shape: bytes = numbers([4]),
    strides: bytes = numbers([1]),
    more: bytes = b"",
) -> bytes:
    """`_rebuild_tensor_v2(…)`; each part is the opcodes that make it."""
    return REBUILD + tuple_of([stored, offset, shape, strides, b"\x89", HOOKS, more]) + b"R"


def pickle_of(value: bytes) -> bytes:
    """A whole pickle, of protocol 2."""
    return b"\x80\x02" + value + b"."


def state_dict(tensors: Mapping[str, bytes]) -> bytes:
    """A whole pickle of a dict."""
    items = b"".join(text(name) + value for name, value in tensors.items())
    return pickle_of(b"}(" + items + b"u")


class ZipEntry(msgspec.Struct, kw_only=True):
    """One entry; `local` and `central` replace fields of its headers."""

    name: bytes
    data: bytes = b""
    local: dict[str, int | bytes] = {}
    central: dict[str, int | bytes] = {}
    descriptor: bytes = b""
    padding: bytes = b""
    """Between the bytes of this entry and the next header."""


def zip_of(
    entries: Iterable[ZipEntry], *, start: int = 0, end: Mapping[str, int | bytes] | None = None
) -> bytes:
    """A zip file of stored entries; `end` replaces fields of the record at its end."""
    body, directory, count = bytearray(bytes(start)), bytearray(), 0
    for entry in entries:
        size = len(entry.data)
        common: dict[str, int | bytes] = {"crc32": zlib.crc32(entry.data), "flags": 0, "method": 0}
        common.update(stored=size, full=size, name=entry.name, extra=b"")
        central = common | {"offset": len(body), "attributes": 0, "disk": 0, "comment": b""}
        directory += _central(central | entry.central)
        body += _local(common | entry.local) + entry.data + entry.descriptor + entry.padding
        count += 1
    fields: dict[str, int | bytes] = {"count": count, "size": len(directory), "offset": len(body)}
    fields |= {"comment": b"", "before": b"", "after": b"", "here": count, "disk": 0}
    fields.update(end or {})
    tail = struct.pack(
        "<4s4H2LH",
        b"PK\x05\x06",
        fields["disk"],
        0,
        fields["here"],
        fields["count"],
        fields["size"],
        fields["offset"],
        len(_bytes(fields["comment"])),
    )
    parts = (fields["before"], tail, fields["comment"], fields["after"])
    return bytes(body + directory) + b"".join(map(_bytes, parts))


def end_of_zip64(count: int, size: int, offset: int, *, position: int | None = None) -> bytes:
    """The 64-bit end of a directory, and its locator."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
    where = (offset + size) % (1 << 64) if position is None else position
    return record + struct.pack("<4sLQL", b"PK\x06\x07", 0, where, 1)


def torch_zip(
    pickle: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    more: Iterable[ZipEntry] = (),
    byte_order: bytes = b"little",
) -> bytes:
    """A file of `torch.save`: its pickle, and storages by key (`0`: 16 bytes, by default)."""
    files = {"data.pkl": pickle, "byteorder": byte_order}
    files |= {f"data/{key}": data for key, data in (storages or {"0": bytes(16)}).items()}
    files |= {"version": b"3\n"}
    entries = [ZipEntry(name=f"m/{name}".encode(), data=data) for name, data in files.items()]
    return zip_of([*entries, *more])


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def _central(of: Mapping[str, int | bytes]) -> bytes:
    name, extra, comment = _bytes(of["name"]), _bytes(of["extra"]), _bytes(of["comment"])
    sizes = (of["crc32"], of["stored"], of["full"], len(name), len(extra), len(comment))
    head = struct.pack(
        "<4s6H3L5H2L",
        b"PK\x01\x02",
        45,
        45,
        of["flags"],
        of["method"],
        0,
        0,
        *sizes,
        of["disk"],
        0,
        of["attributes"],
        of["offset"],
    )
    return head + name + extra + comment


def _local(of: Mapping[str, int | bytes]) -> bytes:
    name, extra = _bytes(of["name"]), _bytes(of["extra"])
    sizes = (of["crc32"], of["stored"], of["full"], len(name), len(extra))
    head = struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, of["flags"], of["method"], 0, 0, *sizes)
    return head + name + extra
