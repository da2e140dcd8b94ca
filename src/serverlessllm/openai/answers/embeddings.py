"""Embeddings: either encoding, whichever the engine gives."""

from __future__ import annotations

import base64
import binascii
import math
import sys
from array import array

import msgspec
from msgspec import Raw

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.answers.asked import Asked
from serverlessllm.openai.answers.failures import nonsense

_OTHERS = (b'"', b"{", b"u", b"a")
"""Each JSON value that is neither a number nor an array has one of these: `null`, `false`, …"""
_floats = msgspec.json.Decoder(list[float])
_text = msgspec.json.Decoder(str)
_encode = msgspec.json.Encoder().encode


class SaidRow(msgspec.Struct):
    """As an engine says it: an array of numbers, or base64."""

    embedding: Raw
    index: int | None = None


class Row(msgspec.Struct):
    """As the client sees it."""

    index: int
    embedding: Raw
    object: str = "embedding"


def row(said: SaidRow, place: int, asked: Asked) -> Row:
    """One vector in the encoding, and of the length, that were asked for.

    Raises:
        BackendProtocolError: it is no vector.
        InvalidRequest: the model's vectors are shorter than what was asked for.
    """
    index = place if said.index is None else said.index
    encoded = bytes(said.embedding)
    is_base64 = encoded.startswith(b'"')
    if not is_base64 and not _is_flat(encoded):
        raise nonsense("an embedding is not a list of numbers")
    if not is_base64 and not asked.base64 and asked.dimensions is None:
        return Row(index, said.embedding)
    vector = _from_base64(encoded) if is_base64 else array("f", _floats.decode(encoded))
    if asked.dimensions is not None:
        vector = _shortened(vector, asked.dimensions)
    written = _to_base64(vector) if asked.base64 else _encode(vector.tolist())
    if written.find(b"null") > 0 and not asked.base64:
        raise nonsense("an embedding has numbers that are not finite")
    return Row(index, Raw(written))


def _is_flat(encoded: bytes) -> bool:
    """Whether a JSON value (which it is) is an array of numbers; none of them is built for it."""
    return (
        encoded.startswith(b"[")
        and encoded.find(b"[", 1) < 0
        and not any(each in encoded for each in _OTHERS)
    )


def _from_base64(encoded: bytes) -> array[float]:
    vector = array("f")
    try:
        vector.frombytes(base64.b64decode(_text.decode(encoded), validate=True))
    except (binascii.Error, ValueError):
        raise nonsense("an embedding is not the base64 of float32 numbers") from None
    return _little_endian(vector)


def _to_base64(vector: array[float]) -> bytes:
    return b'"%b"' % base64.b64encode(_little_endian(vector).tobytes())


def _little_endian(vector: array[float]) -> array[float]:
    if sys.byteorder == "big":
        vector.byteswap()
    return vector


def _shortened(vector: array[float], dimensions: int) -> array[float]:
    """Its first numbers, of length 1 again: what models are trained for that offer a choice."""
    if len(vector) == dimensions:
        return vector
    if len(vector) < dimensions:
        raise InvalidRequest(
            f"dimensions: this model's embeddings have {len(vector)}", param="dimensions"
        )
    short = vector[:dimensions]
    norm = math.sqrt(sum(value * value for value in short))
    return array("f", [value / norm for value in short]) if norm else short
