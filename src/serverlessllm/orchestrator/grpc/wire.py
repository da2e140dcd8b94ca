"""How many parts a message of the protocol buffers has, found before any of them is made.

Their parser is quick with bytes and slow with parts: a message of 4 MiB that is a map of 300,000
keys holds the interpreter for a second, one that is a prompt for less than a millisecond.

Wire format: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from serverlessllm.core.errors import InvalidRequest

_PARTS_MAX: Final = 8192
"""Fields, elements and keys of a whole message: the largest tensor has half as many elements."""
_PACKED_BYTES: Final = 8
"""Of packed numbers, as a part: they are made many times faster."""
_QUICK_BYTES: Final = 16_384
"""No message of that size has parts enough to matter."""
_VARINT_BYTES_MAX: Final = 10
_VARINT, _FIXED_64, _SIZED, _FIXED_32 = 0, 1, 2, 5


class Malformed(Exception):
    """The bytes are no message."""


def check_parts(kind: type[Message], data: bytes) -> None:
    """Look through the bytes of a message.

    Raises:
        InvalidRequest: it has too many parts.
        Malformed: it has no parts that one could count. Groups are taken for that: proto3 has none.
    """
    if len(data) <= _QUICK_BYTES:
        return
    left = _PARTS_MAX
    unread = [(_inside(kind.DESCRIPTOR), 0, len(data))]
    while unread:
        inside, at, end = unread.pop()
        while at < end:
            tag, at = _varint(data, at)
            form = tag & 7
            left -= 1
            if form == _SIZED:
                size, at = _varint(data, at)
                if size > end - at:
                    raise Malformed
                field = tag >> 3
                if field in inside:
                    of = inside[field]
                    if of is None:
                        left -= size // _PACKED_BYTES
                    else:
                        unread.append((_inside(of), at, at + size))
                at += size
            else:
                at = _skip(data, at, form)
            if left < 0:
                raise InvalidRequest(f"the message has more than {_PARTS_MAX} parts")
        if at > end:
            raise Malformed


@cache
def _inside(kind: Any) -> dict[int, Any]:
    """Fields whose bytes have parts: messages of a kind, or (None) numbers. Not texts and bytes."""
    texts = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES}
    return {
        number: field.message_type
        for number, field in kind.fields_by_number.items()
        if field.type not in texts
    }


def _skip(data: bytes, at: int, form: int) -> int:
    if form == _VARINT:
        return _varint(data, at)[1]
    if form == _FIXED_64:
        return at + 8
    if form == _FIXED_32:
        return at + 4
    raise Malformed


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number there, and where it ends."""
    value = shift = 0
    for place in range(at, min(at + _VARINT_BYTES_MAX, len(data))):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + 1
        shift += 7
    raise Malformed
