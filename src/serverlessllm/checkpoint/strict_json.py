"""JSON from strangers: what the format leaves open is refused, not guessed."""

from __future__ import annotations

import json

from serverlessllm.core.errors import CheckpointError


def parse_json(data: bytes, what: str) -> object:
    """Parse UTF-8 JSON; the caller has bounded its size.

    Raises:
        CheckpointError: not JSON, not UTF-8, nested too deep, NaN, or a key that occurs twice
            (readers disagree on which one counts, so a digest of the text would prove nothing).
    """
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise CheckpointError(f"{what}: the JSON is nested too deep") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, our own, huge integers
        raise CheckpointError(f"{what}: not valid JSON: {error}"[:500]) from None


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:100]!r} occurs twice in one object")
    return parsed


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
