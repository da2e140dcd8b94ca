"""Archives of `torch.save`: made without torch, read exactly, refused where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlessllm.checkpoint.convert import plan_layout
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.pickles.archive import check_local, read_directory
from serverlessllm.checkpoint.pickles.interpreter import read_state_dict
from serverlessllm.checkpoint.sources import torch_zip as source
from serverlessllm.checkpoint.sources.base import MemoryFile, RawFile, open_file
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.testing.checkpoints import raw_checkpoint
from serverlessllm.testing.hostile_zips import HostileArchive, hostile_archives
from serverlessllm.testing.torch_files import (
    ZipEntry,
    end_of_zip64,
    number,
    numbers,
    state_dict,
    storage,
    tensor,
    text,
    torch_zip,
    zip_of,
)

PICKLE = state_dict({"a": tensor()})
BYTES = bytes(range(16))
HOSTILE = list(hostile_archives(PICKLE))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox has tests of its own; here it would cost a process an example."""
    monkeypatch.setattr(source, "read_state_dict_apart", read_state_dict)


def content(layout: Layout) -> dict[str, bytes]:
    data = bytearray(layout.size_bytes)
    layout.read_into(0, memoryview(data))
    return {t.name: bytes(data[t.offset : t.offset + t.size_bytes]) for t in layout.tensors}


def read(pickle: bytes, **storages: bytes) -> Layout:
    data = torch_zip(pickle, {key[1:]: value for key, value in storages.items()})
    return plan_layout(raw_checkpoint({"pytorch_model.bin": data}))


def test_a_tensor_is_read_straight_from_the_file() -> None:
    layout = read(PICKLE, _0=BYTES)
    assert content(layout) == {"a": BYTES}
    (segment,) = layout.segments
    assert segment.file.name == "pytorch_model.bin:data/0"


def test_views_of_one_storage() -> None:
    shape, strides = numbers([2, 2]), numbers([1, 2])
    tensors = {
        "whole": tensor(),
        "tail": tensor(offset=number(2), shape=numbers([2])),
        "transposed": tensor(shape=shape, strides=strides),
        "expanded": tensor(shape=numbers([3, 2]), strides=numbers([0, 1])),
        "tied": tensor(shape=shape, strides=strides),
        "square": tensor(shape=shape, strides=numbers([2, 1])),
        "scalar": tensor(offset=number(3), shape=numbers([]), strides=numbers([])),
        "empty": tensor(offset=number(9), shape=numbers([0, 5]), strides=numbers([5, 1])),
    }
    layout = read(state_dict(tensors), _0=BYTES)
    items = [BYTES[n : n + 4] for n in range(0, 16, 4)]
    swapped = b"".join(items[n] for n in (0, 2, 1, 3))
    name = ({"tied", "transposed"} - layout.aliases.keys()).pop()
    assert content(layout) == {
        "whole": BYTES,
        "tail": BYTES[8:],
        name: swapped,
        "expanded": (items[0] + items[1]) * 3,
        "square": BYTES,
        "scalar": items[3],
        "empty": b"",
    }
    assert set(layout.aliases.values()) == {name}


def test_tied_tensors_are_stored_once() -> None:
    names = ("lm_head.weight", "model.embed_tokens.weight")
    layout = read(state_dict(dict.fromkeys(names, tensor())), _0=BYTES)
    assert layout.aliases == {names[0]: names[1]}
    assert layout.size_bytes == 16


def test_shards_are_one_model() -> None:
    one, two = (f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2))
    weight_map = {"weight_map": {"a": one, "b": two}}
    files = {
        one: torch_zip(PICKLE, {"0": BYTES}),
        two: torch_zip(state_dict({"b": tensor()}), {"0": BYTES[::-1]}),
        "pytorch_model.bin.index.json": json.dumps(weight_map).encode(),
        "config.json": b'{"architectures": ["X"]}',
    }
    layout = plan_layout(raw_checkpoint(files))
    assert content(layout) == {"a": BYTES, "b": BYTES[::-1]}
    assert layout.architecture == "X"
    assert [file.name for file in layout.side_files] == ["config.json"]


def test_the_same_bytes_have_the_same_fingerprint_and_other_views_another() -> None:
    def fingerprint(strides: list[int]) -> str:
        view = tensor(shape=numbers([2, 2]), strides=numbers(strides))
        return read(state_dict({"a": view}), _0=BYTES).fingerprint(4096)

    assert fingerprint([1, 2]) == fingerprint([1, 2])
    assert len({fingerprint(s) for s in ([1, 2], [2, 1], [0, 1], [1, 0])}) == 4


@pytest.mark.parametrize("case", HOSTILE, ids=[case.name for case in HOSTILE])
def test_hostile_archives_are_refused(case: HostileArchive) -> None:
    with pytest.raises(case.error) as refused:
        plan_layout(raw_checkpoint({"m.pt": case.data}))
    assert refused.value.message.startswith("m.pt: ")
    assert refused.value.message.isprintable()


def test_a_header_far_away_is_checked_when_its_bytes_are_read() -> None:
    data = torch_zip(PICKLE, {"0": BYTES}).replace(b"m/data/0", b"m/data/1", 1)
    files: dict[str, RawFile] = {"m.pt": _Far(MemoryFile("m.pt", data))}
    raw = raw_checkpoint({})
    layout = plan_layout(type(raw)(files=files, model="m", source="s", revision="r"))
    with pytest.raises(CheckpointError, match="data/0 is not what the zip directory says"):
        content(layout)


class _Far:
    def __init__(self, file: MemoryFile) -> None:
        self.name, self.size_bytes, self.version = file.name, file.size_bytes, file.version
        self.read_into = file.read_into


def test_an_archive_of_64_bits(tmp_path: Path) -> None:
    """A storage of 5 GB (a hole), and one behind it."""
    size = 5_000_000_000
    full = 0xFFFFFFFF
    path = tmp_path / "m.pt"
    wide = (1).to_bytes(2, "little") + (16).to_bytes(2, "little") + size.to_bytes(8, "little") * 2
    pickle = state_dict(
        {
            "big": tensor(
                storage(b"ctorch\nByteStorage\n", text("0"), number(size)),
                number(size - 1),
                numbers([1]),
            ),
            "a": tensor(storage(key=text("1"))),
        }
    )
    lie: dict[str, int | bytes] = {"full": full, "stored": full, "extra": wide}
    entries = [
        ZipEntry(name=b"m/data.pkl", data=pickle),
        ZipEntry(name=b"m/data/0", local=lie, central=lie),
        ZipEntry(name=b"m/data/1", data=BYTES),
    ]
    small = zip_of(entries)
    hole = small.index(b"m/data/0") + 8 + len(wide)
    directory = small.index(b"PK\x01\x02")
    last = small.rindex(b"PK\x01\x02")
    behind = small.index(b"PK\x03\x04", hole) + size
    moved = bytearray(small[last:-22])
    moved[30:32] = (12).to_bytes(2, "little")
    moved[42:46] = b"\xff" * 4
    moved += b"\x01\0\x08\0" + behind.to_bytes(8, "little")
    rows = small[directory:last] + moved
    end = end_of_zip64(3, len(rows), directory + size)
    with path.open("wb") as file:
        file.write(small[:hole])
        file.seek(hole + size - 1)
        file.write(b"\x07" + small[hole:directory] + rows + end)
        file.write(
            b"PK\x05\x06" + bytes(4) + (3).to_bytes(2, "little") * 2 + b"\xff" * 8 + bytes(2)
        )
    layout = plan_layout(open_file(path, model="m"))
    assert content(layout) == {"big": b"\x07", "a": BYTES}


GOOD = torch_zip(PICKLE, {"0": BYTES})


@settings(deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_a_directory_with_another_byte_is_read_or_refused(position: int, value: int) -> None:
    data = bytearray(GOOD)
    data[position] = value
    file = MemoryFile("m.pt", bytes(data))
    try:
        directory = read_directory(file)
        for entry in directory.entries.values():
            check_local(file, entry)
    except CheckpointError:
        return
    for entry in directory.entries.values():
        assert 0 <= entry.offset <= entry.offset + entry.size_bytes <= len(data)


@settings(deadline=None)
@given(st.integers(0, len(GOOD) - 1))
def test_no_cut_archive_is_accepted(length: int) -> None:
    with pytest.raises(CheckpointError):
        read_directory(MemoryFile("m.pt", GOOD[:length]))


def test_empty_tensors_of_one_place_and_several_shapes() -> None:
    tensors = {
        str(shape): tensor(shape=numbers(shape), strides=numbers([1] * len(shape)))
        for shape in ([0], [0, 5], [5, 0], [2, 0, 3])
    }
    layout = read(state_dict({**tensors, "a": tensor()}), _0=BYTES)
    assert content(layout) == {**dict.fromkeys(tensors, b""), "a": BYTES}


def test_windows_over_a_storage_are_refused_with_the_way_out() -> None:
    """Each of their elements would be a read: a gigabyte of them takes hours."""
    windows = tensor(shape=numbers([3, 2]), strides=numbers([1, 1]))
    with pytest.raises(UnsupportedCheckpoint, match=r"'a': its elements overlap.*contiguous.*save"):
        read(state_dict({"a": windows}), _0=BYTES)


def test_slices_across_a_storage_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "REREAD_BYTES_MAX", 30)
    monkeypatch.setattr(source, "REREAD_MAX", 0)
    slices = {
        name: tensor(offset=number(at), shape=numbers([2]), strides=numbers([2]))
        for at, name in enumerate(("even", "odd"))
    }
    assert len(read(state_dict(slices), _0=BYTES).tensors) == 2
    with pytest.raises(CheckpointError, match=r"'more': .*slices across one another"):
        read(state_dict(slices | {"more": slices["even"]}))
