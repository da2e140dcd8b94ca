"""Mutations that keep JSON whole: random bytes seldom get past the first brace."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import atheris

_NUMBERS = (0, 1, -1, 7, 63, 64, 4096, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30)
_OTHERS: tuple[Any, ...] = (
    None,
    True,
    0.5,
    1e308,
    "",
    "../x",
    "a\u0000b",
    "\u202e",
    "x" * 600,
    [],
    {},
    [[]],
)

Node = Any  # a list or a dict, with whatever key goes with it


def mutate_json(data: bytes, size_max: int, seed: int) -> bytes:
    """One change somewhere in the tree, or, half of the time, libFuzzer's own of the bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        return bytes(atheris.Mutate(data, size_max))
    try:
        tree = json.loads(data)
        places = list(_places(tree))
        node, key = chance.choice(places)
        _change(node, key, chance)
        changed = json.dumps(tree, separators=(",", ":")).encode()
    except (ValueError, IndexError, RecursionError):
        return bytes(atheris.Mutate(data, size_max))
    return changed if len(changed) <= size_max else data


def _places(node: object) -> Iterator[tuple[Node, str | int]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield node, key
            yield from _places(value)
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield node, position
            yield from _places(value)


def _change(node: Node, key: str | int, chance: random.Random) -> None:
    value = node[key]
    match chance.randrange(5):
        case 0 if isinstance(value, int):
            new: object = value + chance.choice((-64, -8, -1, 1, 8, 64))
        case 1:
            new = chance.choice(_OTHERS)
        case 2:
            del node[key]
            return
        case 3 if isinstance(node, list):
            node.append(value)
            return
        case 3:
            node[str(key) + "2"] = value
            return
        case _:
            new = chance.choice(_NUMBERS)
    node[key] = new
