"""Mutations that keep JSON, lines and pickles whole: random bytes seldom get past a brace."""

from __future__ import annotations

import json
import pickletools
import random
from collections.abc import Callable, Iterator
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


def mutate_pickle(data: bytes, size_max: int, seed: int) -> bytes:
    """Drop, repeat, swap or replace one opcode, or, half of the time, libFuzzer's own."""
    chance = random.Random(seed)
    opcodes = _opcodes(data) if chance.random() < 0.5 else []
    if len(opcodes) < 2:
        return bytes(atheris.Mutate(data, size_max))
    _shuffle(opcodes, chance, lambda opcode: bytes(atheris.Mutate(opcode, 64)))
    return b"".join(opcodes)[:size_max]


def mutate_lines(data: bytes, size_max: int, seed: int) -> bytes:
    """Drop, repeat, swap or change one line, as JSON where it is."""
    chance = random.Random(seed)
    lines = data.split(b"\n")
    _shuffle(lines, chance, lambda line: mutate_json(line, 1024, seed))
    return b"\n".join(lines)[:size_max]


def _shuffle(parts: list[bytes], chance: random.Random, change: Callable[[bytes], bytes]) -> None:
    first, second = chance.randrange(len(parts)), chance.randrange(len(parts))
    match chance.randrange(4):
        case 0:
            del parts[first]
        case 1:
            parts.insert(first, parts[second])
        case 2:
            parts[first], parts[second] = parts[second], parts[first]
        case _:
            parts[first] = change(parts[first])


def _opcodes(data: bytes) -> list[bytes]:
    """Cut where one opcode ends and the next begins, as far as that can be told."""
    starts = []
    try:
        starts += [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:
        starts.append(len(data))
    ends = [*starts[1:], len(data)]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


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
