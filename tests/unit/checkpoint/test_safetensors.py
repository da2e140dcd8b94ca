"""safetensors: honest files of every kind are planned, lying headers are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from serverlessllm.checkpoint.convert import plan_layout
from serverlessllm.checkpoint.index import SideFile, Tensor
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.sources.base import MemoryFile, open_file
from serverlessllm.checkpoint.sources.pick import SHARD_MAP
from serverlessllm.checkpoint.sources.safetensors import HEADER_BYTES_MAX, read_header
from serverlessllm.core.errors import CheckpointError
from serverlessllm.testing.checkpoints import RawTensorData, raw_checkpoint, safetensors_bytes

deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def entry(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def file_of(header: object, data: bytes = bytes(64)) -> MemoryFile:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MemoryFile("model.safetensors", len(text).to_bytes(8, "little") + text + data)


def layout_of(files: dict[str, bytes]) -> Layout:
    return plan_layout(raw_checkpoint(files))


def content(layout: Layout) -> dict[str, bytes]:
    data = bytearray(layout.size_bytes)
    layout.read_into(0, memoryview(data))
    parts: tuple[Tensor | SideFile, ...] = (*layout.tensors, *layout.side_files)
    return {p.name: bytes(data[p.offset : p.offset + p.size_bytes]) for p in parts}


def u8(data: bytes) -> RawTensorData:
    return RawTensorData("U8", (len(data),), data)


GOOD = {"a": entry(0, 16), "b": entry(16, 64, "F32", [3, 4])}


def test_reads_an_honest_header() -> None:
    header = read_header(file_of({"__metadata__": {"format": "pt"}} | GOOD))
    assert [(t.name, t.dtype, t.shape, t.size_bytes) for t in header.tensors] == [
        ("a", "U8", (16,), 16),
        ("b", "F32", (3, 4), 48),
    ]
    assert header.metadata == {"format": "pt"}


LIES = {
    "a size past the end": {"a": entry(0, 65)},
    "a size that wraps": {"a": entry(0, 64, "F64", [1 << 61, 2, 4])},
    "a negative dimension": {"a": entry(0, 64, "U8", [-64])},
    "negative dimensions that cancel": {"a": entry(0, 64, "U8", [-8, -8])},
    "nine dimensions": {"a": entry(0, 64, "U8", [1] * 8 + [64])},
    "a fractional dimension": {"a": entry(0, 64, "U8", [64.0])},
    "a text for a dimension": {"a": entry(0, 64, "U8", ["64"])},
    "a huge dimension": {"a": entry(0, 64, "U8", [10**30])},
    "a negative offset": {"a": entry(-8, 56)},
    "offsets backwards": {"a": entry(64, 0, "U8", [64])},
    "a shape of another size": {"a": entry(0, 64, "F32", [17])},
    "an unknown dtype": {"a": entry(0, 64, "Q4_0")},
    "half a byte": {"a": entry(0, 64, "F4", [127])},
    "an overlap": {"a": entry(0, 40), "b": entry(32, 64)},
    "a gap": {"a": entry(0, 16), "b": entry(32, 64)},
    "a gap at the start": {"a": entry(16, 64)},
    "bytes left over": {"a": entry(0, 32)},
    "an unknown key": {"a": entry(0, 64) | {"extra": 1}},
    "a missing key": {"a": {"dtype": "U8", "shape": [64]}},
    "three offsets": {"a": entry(0, 64) | {"data_offsets": [0, 32, 64]}},
    "no object": {"a": [0, 64]},
    "an empty name": {"": entry(0, 64)},
    "a name that acts on a terminal": {"\x1b[2J": entry(0, 64)},
    "too long a name": {"x" * 513: entry(0, 64)},
    "metadata that is no text": {"__metadata__": {"a": 1}, "a": entry(0, 64)},
    "not JSON": b"{'a': 1}",
    "not an object": b"[]",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b'{"a":' + b"[" * 50_000,
    "a name twice": b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},'
    b'"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}',
    "a key twice": b'{"a":{"dtype":"F64","shape":[64],"data_offsets":[0,64],"dtype":"U8"}}',
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES)
def test_a_lying_header_is_refused(header: object) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(file_of(header))


@pytest.mark.parametrize("data", [b"", bytes(7), b"\xff" * 8, (9).to_bytes(8, "little") + b"{}"])
def test_a_header_that_does_not_fit_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_header(MemoryFile("model.safetensors", data))


def test_a_huge_header_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((HEADER_BYTES_MAX + 1).to_bytes(8, "little"))
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match="does not fit"):
        read_header(open_file(path, model="m").files[path.name])


def test_too_many_tensors_are_refused() -> None:
    many = {str(n): entry(0, 0) for n in range(200_001)}
    with pytest.raises(CheckpointError, match="200001 tensors"):
        read_header(file_of(many, b""))


GOOD_FILE = safetensors_bytes({"a": u8(b"1" * 16), "b": u8(b"2" * 48)}, {"format": "pt"})


@given(st.integers(0, len(GOOD_FILE) - 65), st.integers(0, 255))
def test_whatever_a_header_byte_becomes_we_accept_no_more_than_the_library(
    position: int, value: int
) -> None:
    data = bytearray(GOOD_FILE)
    data[position] = value
    try:
        ours = read_header(MemoryFile("model.safetensors", bytes(data)))
    except CheckpointError:
        return
    theirs = deserialize(bytes(data))
    assert {t.name for t in ours.tensors} == {name for name, _ in theirs}


@given(st.integers(0, len(GOOD_FILE) - 1))
def test_no_truncated_file_is_accepted(length: int) -> None:
    with pytest.raises(CheckpointError):
        read_header(MemoryFile("model.safetensors", GOOD_FILE[:length]))
    with pytest.raises(SafetensorError):
        deserialize(GOOD_FILE[:length])


def test_each_tensor_lies_aligned_with_its_own_bytes() -> None:
    tensors = {f"model.layers.{n}.w": u8(bytes([n]) * (n + 1)) for n in (10, 9, 2)}
    layout = layout_of({"model.safetensors": safetensors_bytes(tensors), "config.json": b"{}"})
    assert [t.name for t in layout.tensors] == [f"model.layers.{n}.w" for n in (2, 9, 10)]
    assert [t.offset for t in layout.tensors] == [0, 64, 128]
    assert content(layout) == {name: t.data for name, t in tensors.items()} | {"config.json": b"{}"}


def shards(weight_map: object) -> dict[str, bytes]:
    return {
        "model-00001-of-00002.safetensors": safetensors_bytes({"a": u8(b"one"), "c": u8(b"see")}),
        "model-00002-of-00002.safetensors": safetensors_bytes({"b": u8(b"two")}),
        SHARD_MAP: json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
    }


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_are_one_model() -> None:
    layout = layout_of(shards({"a": ONE, "b": TWO}))
    assert content(layout) == {"a": b"one", "b": b"two", "c": b"see"}


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": ONE, "b": ONE},
        {"a": ONE, "b": TWO, "d": TWO},
        {"a": ONE, "b": "../" + TWO},
        {"a": ONE, "b": "/etc/passwd"},
        {"a": ONE, "b": "model-00003-of-00003.safetensors"},
        {"a": 1},
        None,
        [],
    ],
)
def test_a_lying_shard_map_is_refused(weight_map: object) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json"):
        layout_of(shards(weight_map))


def test_a_tensor_in_two_shards_is_refused_unless_the_map_decides() -> None:
    files = shards({"a": ONE, "b": TWO})
    files[TWO] = safetensors_bytes({"a": u8(b"xxx"), "b": u8(b"two")})
    assert content(layout_of(files))["a"] == b"one"
    del files[SHARD_MAP]
    with pytest.raises(CheckpointError, match="'a' is in two files"):
        layout_of(files)


def test_two_names_of_the_same_bytes_are_stored_once() -> None:
    header = {HEAD: entry(0, 64), EMBEDDING: entry(0, 64)}
    layout = layout_of({"model.safetensors": file_of(header, b"e" * 64).data})
    assert layout.aliases == {HEAD: EMBEDDING}
    assert layout.size_bytes == 64
    assert content(layout) == {EMBEDDING: b"e" * 64}


def test_the_same_bytes_read_differently_are_refused() -> None:
    header = {"a": entry(0, 64), "b": entry(0, 64, "F32", [16])}
    with pytest.raises(CheckpointError, match="read the same bytes differently"):
        layout_of({"model.safetensors": file_of(header).data})


def test_empty_tensors_share_nothing() -> None:
    tensors = {"a": u8(b""), "b": u8(b""), "c": u8(b"x")}
    layout = layout_of({"model.safetensors": safetensors_bytes(tensors)})
    assert content(layout) == {"a": b"", "b": b"", "c": b"x"}
    assert layout.aliases == {}


def test_a_head_stored_twice_is_stored_once() -> None:
    same = {EMBEDDING: u8(b"e" * 3_000_000), HEAD: u8(b"e" * 3_000_000)}
    layout = layout_of({"model.safetensors": safetensors_bytes(same)})
    assert layout.aliases == {HEAD: EMBEDDING}
    assert layout.size_bytes == 3_000_000
    other = same | {HEAD: u8(b"e" * 2_999_999 + b"f")}
    layout = layout_of({"model.safetensors": safetensors_bytes(other)})
    assert layout.aliases == {}
    assert content(layout)[HEAD][-1:] == b"f"


def test_a_tied_head_that_the_writer_left_out_is_an_alias() -> None:
    data = safetensors_bytes({EMBEDDING: u8(b"e")})
    tied = layout_of({"model.safetensors": data, "config.json": b'{"tie_word_embeddings": true}'})
    assert tied.aliases == {HEAD: EMBEDDING}
    untied = layout_of({"model.safetensors": data, "config.json": b"{}"})
    assert untied.aliases == {}


def test_ties_noted_in_the_metadata_are_aliases() -> None:
    metadata = {"format": "pt", "tied": EMBEDDING, "other": "nothing", EMBEDDING: EMBEDDING}
    data = safetensors_bytes({EMBEDDING: u8(b"e")}, metadata)
    assert layout_of({"model.safetensors": data}).aliases == {"tied": EMBEDDING}


def test_a_file_without_tensors_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        layout_of({"model.safetensors": safetensors_bytes({})})


@pytest.mark.parametrize("name", ["\x1b[2J", "", "x" * 513])
def test_a_tie_in_the_metadata_under_no_name_is_refused(name: str) -> None:
    data = safetensors_bytes({"a": u8(b"abc")}, {name: "a"})
    with pytest.raises(CheckpointError, match="name of a tensor that was left out"):
        layout_of({"model.safetensors": data})


def test_an_architecture_that_acts_on_a_terminal_is_refused() -> None:
    data = safetensors_bytes({"a": u8(b"abc")})
    config = json.dumps({"architectures": ["\x1b[2J"]}).encode()
    with pytest.raises(CheckpointError, match=r"config\.json: architecture"):
        layout_of({"model.safetensors": data, "config.json": config})


@pytest.mark.parametrize(
    "inside",
    [b'"a":0,' * 2_000_000, b'"a":[' + b"0," * 3_000_000, b'"a":[' + b"[" * 3_000_000],
    ids=["members", "items", "depth"],
)
def test_json_of_millions_of_values_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch, inside: bytes
) -> None:
    for builder in ("safetensors.parse_json", "safetensors.decode_json", "shards.parse_json"):
        monkeypatch.setattr(f"serverlessllm.checkpoint.sources.{builder}", None)
    with pytest.raises(CheckpointError, match="more values than a model's tensors need"):
        read_header(file_of(b"{" + inside + b"}"))
    with pytest.raises(CheckpointError, match="more values than a model's tensors need"):
        layout_of({SHARD_MAP: inside, "model-00001-of-00001.safetensors": b""})


def test_a_refusal_is_short_however_long_a_name_is() -> None:
    shard = "a-00001-of-00001.safetensors"
    weight_map = json.dumps({"weight_map": {"x" * 100_000: shard}}).encode()
    with pytest.raises(CheckpointError, match="no file has tensor") as refused:
        layout_of({SHARD_MAP: weight_map, shard: safetensors_bytes({"a": u8(b"abc")})})
    assert len(refused.value.message) < 300


def test_a_refusal_cannot_act_on_a_terminal() -> None:
    with pytest.raises(CheckpointError, match="unknown field") as refused:
        read_header(file_of({"a": {**entry(0, 64), "\x1b[2J": 1}}))
    assert refused.value.message.isprintable()


def test_a_map_without_a_shard_says_what_a_shard_is_called() -> None:
    data = safetensors_bytes({"a": u8(b"abc")})
    with pytest.raises(CheckpointError, match=r"called like model-00001-of-00002\.safetensors"):
        layout_of({SHARD_MAP: b'{"weight_map": {}}', "a.safetensors": data})


def test_a_source_of_empty_tensors_is_refused_before_it_is_written() -> None:
    with pytest.raises(CheckpointError, match="all tensors of the source are empty"):
        layout_of({"model.safetensors": safetensors_bytes({"a": u8(b"")})})
