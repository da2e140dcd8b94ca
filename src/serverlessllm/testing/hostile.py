"""Files that pose as PyTorch checkpoints and are none: each must be refused, and do nothing.

Made here rather than kept, so that nobody's scanner finds a museum of malware in the repository.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from serverlessllm.core.errors import CheckpointError, SLLMError
from serverlessllm.testing.hostile_pickles import hostile_pickles
from serverlessllm.testing.hostile_zips import hostile_archives
from serverlessllm.testing.torch_files import (
    number,
    numbers,
    state_dict,
    storage,
    tensor,
    text,
    torch_zip,
)


class Hostile(NamedTuple):
    """What `build` writes into an empty folder must be refused by an `error`."""

    name: str
    build: Callable[[Path], None]
    error: type[SLLMError]


def _lying_views() -> Iterator[tuple[str, bytes]]:
    """Files whose pickle is one, and is not true of the archive."""
    for what, made in {
        "a view beyond its storage": tensor(shape=numbers([5])),
        "an offset beyond its storage": tensor(offset=number(1)),
        "a huge offset": tensor(offset=number((1 << 63) - 1)),
        "a stride beyond its storage": tensor(strides=numbers([2])),
        "a huge stride": tensor(strides=numbers([(1 << 63) - 1])),
        "strides for other dimensions": tensor(strides=numbers([1, 1])),
        "no strides": tensor(strides=numbers([])),
        "nine dimensions": tensor(shape=numbers([1] * 9), strides=numbers([1] * 9)),
        "a product that overflows": tensor(shape=numbers([1 << 32] * 2), strides=numbers([0, 0])),
        "windows without end": tensor(shape=numbers([2, 3]), strides=numbers([1, 1])),
        "elements that overlap far apart": tensor(
            storage(elements=number(4)), shape=numbers([2] * 8), strides=numbers([0] * 6 + [1, 1])
        ),
        "an expanded terabyte": tensor(shape=numbers([1 << 38]), strides=numbers([0])),
        "two dimensions of an expanded terabyte": tensor(
            shape=numbers([1 << 19, 1 << 19]), strides=numbers([0, 0])
        ),
        "a storage that is longer": tensor(storage(elements=number(5))),
        "a storage that is shorter": tensor(storage(elements=number(3)), shape=numbers([3])),
        "a storage of another type": tensor(storage(b"ctorch\nDoubleStorage\n")),
        "a storage that is not there": tensor(storage(key=text("1"))),
        "a storage above its folder": tensor(storage(key=text("../data.pkl"))),
        "a storage by an absolute path": tensor(storage(key=text("/etc/passwd"))),
        "a storage with a zero before it": tensor(storage(key=text("00"))),
        "a storage with another digit": tensor(storage(key=text("\u0660"))),
        "a storage without a name": tensor(storage(key=text(""))),
    }.items():
        yield what, state_dict({"a": made})
    yield "a tensor without a name", state_dict({"": tensor()})
    yield "a tensor whose name acts on a terminal", state_dict({"\x1b[2J": tensor()})
    yield "a tensor whose name is too long", state_dict({"x" * 513: tensor()})


def hostile_checkpoints() -> Iterator[Hostile]:
    """Every hostile pickle in a good archive, hostile archives, and hostile folders of them."""
    for case in hostile_pickles():
        yield Hostile(f"pickle: {case.name}", _one(torch_zip(case.data)), case.error)
    for what, pickle in _lying_views():
        yield Hostile(f"view: {what}", _one(torch_zip(pickle)), CheckpointError)
    good = state_dict({"a": tensor()})
    for archive in hostile_archives(good):
        yield Hostile(f"archive: {archive.name}", _one(archive.data), archive.error)
    for what, build in _FOLDERS.items():
        yield Hostile(f"folder: {what}", build, SLLMError)


def _one(data: bytes) -> Callable[[Path], None]:
    return lambda folder: _write(folder / "pytorch_model.bin", data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


_SHARD = "pytorch_model-0000{}-of-00002.bin"
_MAP = "pytorch_model.bin.index.json"


def _shards(weight_map: str, *, second: str = "b") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for number_, name in ((1, "a"), (2, second)):
            data = torch_zip(state_dict({name: tensor()}))
            (folder / _SHARD.format(number_)).write_bytes(data)
        (folder / _MAP).write_text(f'{{"weight_map": {{{weight_map}}}}}', encoding="utf-8")

    return build


def _lone(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        make(folder / "pytorch_model.bin")

    return build


def _without_map(folder: Path) -> None:
    _shards("", second="a")(folder)
    (folder / _MAP).unlink()


def _one_shard(folder: Path) -> None:
    _shards('"a": "pytorch_model-00001-of-00002.bin"')(folder)
    (folder / _SHARD.format(2)).unlink()
    (folder / _MAP).unlink()


_A = f'"a": "{_SHARD.format(1)}"'
_FOLDERS: dict[str, Callable[[Path], None]] = {
    "a shard above it": _shards(f'{_A}, "b": "../{_SHARD.format(2)}"'),
    "a shard by an absolute path": _shards(f'{_A}, "b": "/etc/passwd"'),
    "a shard by a URL": _shards(f'{_A}, "b": "file:///etc/passwd"'),
    "a shard that is missing": _shards(f'{_A}, "b": "pytorch_model-00003-of-00003.bin"'),
    "a shard that is no text": _shards(f'{_A}, "b": 1'),
    "a tensor that no shard has": _shards(f'{_A}, "c": "{_SHARD.format(2)}"'),
    "a tensor of the other shard": _shards(f'{_A}, "b": "{_SHARD.format(1)}"'),
    "a key twice in the map": _shards(f"{_A}, {_A}"),
    "a map that is no JSON": _shards("'"),
    "a tensor in two shards": _without_map,
    "half of its shards": _one_shard,
    "a link to another file": _lone(lambda path: path.symlink_to("/etc/passwd")),
    "a link to a device": _lone(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _lone(lambda path: path.symlink_to(path.name)),
    "a pipe": _lone(os.mkfifo),
    "a folder by the name of a file": _lone(lambda path: path.mkdir()),
    "an empty file": _lone(lambda path: path.write_bytes(b"")),
}
