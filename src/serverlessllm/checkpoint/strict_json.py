"""JSON from strangers: what the format leaves open is refused, not guessed."""

from __future__ import annotations

import json
from typing import Final, TypeVar

import msgspec

from serverlessllm.checkpoint.bounds import TENSORS_MAX, printable
from serverlessllm.core.errors import CheckpointError

T = TypeVar("T")

MEMBERS_MAX: Final = 5 * TENSORS_MAX
VALUES_MAX: Final = 10 * TENSORS_MAX
"""More than the header of a file with as many tensors as a model may have."""


def parse_json(data: bytes, type_: type[T], what: str) -> T:
    """Decode UTF-8 JSON of a known shape; the caller has bounded its size.

    The typed decoder goes first, so that junk is refused before it becomes objects.

    Raises:
        CheckpointError: not JSON, not of that shape, nested too deep, or a key occurs twice
            (readers disagree on which one counts).
    """
    parsed = decode_json(data, type_, what)
    try:
        json.loads(data, object_pairs_hook=_refuse_duplicates)
    except RecursionError:
        raise CheckpointError(f"{what}: the JSON is nested too deep") from None
    except ValueError as error:  # our own, or where json is stricter than msgspec
        raise CheckpointError(printable(f"{what}: {error}")) from None
    return parsed


def check_values(data: bytes, what: str) -> None:
    """Refuse JSON of more values than any header has, before it becomes 50 times its size.

    Counts what separates values, wherever it stands: a few of these may be in texts.

    Raises:
        CheckpointError: it has.
    """
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > VALUES_MAX or data.count(b":") > MEMBERS_MAX:
        raise CheckpointError(f"{what}: the JSON has more values than a model's tensors need")


def decode_json(data: bytes, type_: type[T], what: str) -> T:
    """Decode JSON whose keys have been checked already, as a part of something.

    Raises:
        CheckpointError: not of that shape.
    """
    try:
        return msgspec.json.decode(data, type=type_)
    except RecursionError:
        raise CheckpointError(f"{what}: the JSON is nested too deep") from None
    except ValueError as error:  # msgspec's own, or not UTF-8
        raise CheckpointError(printable(f"{what}: {error}")) from None


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    """Builds nothing: `json` is only asked for its keys."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"key {key[:100]!r} occurs twice in one object")
        seen.add(key)
