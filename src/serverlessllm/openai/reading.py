"""Read a client's JSON piece by piece, where what a piece is depends on what it says it is."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request.read import explain

_T = TypeVar("_T")
NOTHING = msgspec.Raw(b"null")
"""A piece that is not there; `Raw` takes no part in a union."""
_SHOWN_CHARS = 100
"""Of a client's own text in a message to it."""


class _Kind(msgspec.Struct):
    """What tells one shape of a union from the others."""

    type: str | None = None


_kind = msgspec.json.Decoder(_Kind)
_text_or_kinds = msgspec.json.Decoder(str | list[_Kind])
_kinds = msgspec.json.Decoder(list[_Kind])
_pieces = msgspec.json.Decoder(list[msgspec.Raw])


def read_piece(piece: msgspec.Raw, decoder: msgspec.json.Decoder[_T], path: str) -> _T:
    """A piece of a body that was read before; `path` is where it lies.

    Raises:
        InvalidRequest: its shape is wrong.
    """
    try:
        return decoder.decode(piece)
    except msgspec.ValidationError as error:
        raise explain(error, path) from error


def read_pieces(piece: msgspec.Raw, path: str) -> list[msgspec.Raw]:
    """The objects of an array, each as it came; null has none.

    Raises:
        InvalidRequest: it is no array, or one of them no object. The first that is none ends the
            reading: a million numbers are never made.
    """
    if not is_given(piece):
        return []
    read_piece(piece, _kinds, path)
    return _pieces.decode(piece)


def read_text_or_pieces(piece: msgspec.Raw, path: str) -> str | list[msgspec.Raw]:
    """A text, or as `read_pieces`."""
    found = read_piece(piece, _text_or_kinds, path)
    return found if isinstance(found, str) else _pieces.decode(piece)


def is_given(piece: msgspec.Raw) -> bool:
    """Whether it says more than null."""
    return bytes(memoryview(piece)[:5]) != b"null"


def kind_of(piece: msgspec.Raw, path: str) -> str | None:
    """The `type` that a piece names itself; raises `InvalidRequest` when it is no object."""
    return read_piece(piece, _kind, path).type


def unsupported(path: str, kind: str, known: str) -> InvalidRequest:
    """A piece of a kind that is not served: say which are."""
    shown = kind[:_SHOWN_CHARS]
    return InvalidRequest(f"{path}: {shown!r} is not supported here; {known}", param=path)
