"""Prompts and inputs: a text, texts, token ids, or arrays of token ids."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta, Raw

from serverlessllm.openai.request.checks import items_at_most
from serverlessllm.openai.request.errors import ArrayTooLong, EmptyArray, InvalidType, TextTooShort
from serverlessllm.openai.request.fields import TokenId
from serverlessllm.openai.request.read import explain
from serverlessllm.openai.settings import RequestLimits

_IDS: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
}
Prompts: TypeAlias = Annotated[
    Raw,
    Meta(
        extra_json_schema={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "string"}},
                _IDS,
                {"type": "array", "minItems": 1, "items": _IDS},
            ]
        }
    ),
]
Inputs: TypeAlias = Annotated[
    Raw,
    Meta(
        extra_json_schema={
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                _IDS,
                {"type": "array", "minItems": 1, "items": _IDS},
            ]
        }
    ),
]
"""As `Prompts`, but no text is empty."""

_FIRST = frozenset(byte.to_bytes() for byte in b'"[-0123456789')
"""What an array of prompts can begin with."""
_texts = msgspec.json.Decoder(list[str])
_full_texts = msgspec.json.Decoder(list[Annotated[str, Meta(min_length=1)]])
_ids = msgspec.json.Decoder(list[TokenId])
_arrays_of_ids = msgspec.json.Decoder(list[Annotated[list[TokenId], Meta(min_length=1)]])


def check_texts(param: str, value: Raw, limits: RequestLimits, *, empty: bool = True) -> int:
    """How many prompts `value` has; a text may be empty if `empty`.

    Raises:
        InvalidRequest: it is none, or too many; `param` names which.
    """
    start = bytes(memoryview(value)[:64])
    if start[:1] == b'"':
        if start[:2] == b'""' and not empty:
            raise TextTooShort(f"{param}: must not be empty", param=param)
        return 1
    if start[:1] != b"[":
        raise InvalidType(f"{param}: expected a string or an array", param=param)
    first = start[1:].lstrip()[:1]
    if first == b"]":
        raise EmptyArray(f"{param}: must not be empty", param=param)
    if first not in _FIRST:
        raise InvalidType(f"{param}[0]: expected a string or a token id", param=f"{param}[0]")
    if first == b'"':
        count = len(_decoded(param, _texts if empty else _full_texts, value))
    else:
        _check_counts(param, bytes(value), limits)
        if first != b"[":
            _decoded(param, _ids, value)
            return 1
        count = len(_decoded(param, _arrays_of_ids, value))
    items_at_most(param, count, limits.inputs_max, "items")
    return count


def _check_counts(param: str, value: bytes, limits: RequestLimits) -> None:
    """Refuse too many before any is read: a comma is counted in a tenth of the time."""
    if value.count(b",") >= limits.token_ids_max:
        raise ArrayTooLong(f"{param}: at most {limits.token_ids_max} token ids", param=param)
    items_at_most(param, value.count(b"[") - 1, limits.inputs_max, "items")


def _decoded(param: str, decoder: msgspec.json.Decoder[list[Any]], value: Raw) -> list[Any]:
    try:
        return decoder.decode(value)
    except msgspec.ValidationError as error:
        raise explain(error, param) from error
