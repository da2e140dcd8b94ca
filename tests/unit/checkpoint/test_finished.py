"""A checkpoint as a source: nothing is believed that its digests do not say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from serverlessllm.checkpoint import side_files
from serverlessllm.checkpoint.convert import Converted, convert, plan_layout
from serverlessllm.checkpoint.index import Quantization, encode_index
from serverlessllm.checkpoint.sources.base import MemoryFile, open_file, open_folder
from serverlessllm.checkpoint.sources.pick import pick
from serverlessllm.core.errors import CheckpointError, CorruptChunk
from serverlessllm.testing.checkpoints import write_random_gguf, write_random_safetensors

CHUNK_BYTES = 4096
QUANTIZATION = Quantization(scheme="int8", library="lib 1", error=0.25)


@pytest.fixture
def first(tmp_path: Path) -> Converted:
    source = write_random_safetensors(tmp_path / "source")
    return convert(
        open_folder(source, model="org/first", license="mit"),
        tmp_path / "first",
        chunk_bytes=CHUNK_BYTES,
        quantization=QUANTIZATION,
    )


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 4 * CHUNK_BYTES])
def test_it_is_taken_as_it_is_under_another_name(first, chunk_bytes, tmp_path):
    raw = open_folder(first.bin_path.parent, model="org/second", source="file:x", revision="r2")
    second = convert(raw, tmp_path / "second", chunk_bytes=chunk_bytes)
    assert second.bin_path.read_bytes() == first.bin_path.read_bytes()
    assert second.index == msgspec.structs.replace(
        first.index,
        model="org/second",
        source="file:x",
        revision="r2",
        chunk_bytes=chunk_bytes,
        chunks=second.index.chunks,
    )
    assert second.index.quantization == QUANTIZATION
    if chunk_bytes == CHUNK_BYTES:
        assert second.index.chunks == first.index.chunks


def test_a_gguf_stays_one(tmp_path):
    source = write_random_gguf(tmp_path / "m.gguf")
    first = convert(open_file(source, model="m"), tmp_path / "first")
    second = convert(open_folder(tmp_path / "first", model="m", source="s"), tmp_path / "second")
    assert second.index.kind == "gguf"
    assert second.index.tensors == first.index.tensors
    assert second.bin_path.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 4 * CHUNK_BYTES])
def test_a_flipped_bit_is_found_and_named(first, chunk_bytes, tmp_path):
    data = bytearray(first.bin_path.read_bytes())
    data[2 * CHUNK_BYTES + 17] ^= 4
    first.bin_path.write_bytes(data)
    raw = open_folder(first.bin_path.parent, model="m")
    with pytest.raises(CorruptChunk, match="chunk 2 of org/first"):
        convert(raw, tmp_path / "second", chunk_bytes=chunk_bytes)
    assert not list((tmp_path / "second").iterdir())


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_refused(first, change):
    data = first.bin_path.read_bytes()
    first.bin_path.write_bytes(data[:-1] if change < 0 else data + b"x")
    with pytest.raises(CheckpointError, match=r"model\.bin has \d+ bytes where its index says"):
        plan_layout(open_folder(first.bin_path.parent, model="m"))


def test_an_index_that_lies_is_refused(first):
    lying = encode_index(msgspec.structs.replace(first.index, size_bytes=1 << 30))
    raw = open_folder(first.bin_path.parent, model="m")
    files = {**raw.files, "model.idx": MemoryFile("model.idx", lying)}
    with pytest.raises(CheckpointError, match="chunks where"):
        plan_layout(msgspec.structs.replace(raw, files=files))


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
def test_any_part_of_it_can_be_read(first, offset, size):
    layout = plan_layout(open_folder(first.bin_path.parent, model="m"))
    buffer = bytearray(size)
    layout.read_into(offset, memoryview(buffer))
    assert buffer == first.bin_path.read_bytes()[offset : offset + size]


def test_a_checkpoint_comes_before_all_else():
    names = ["model.bin", "model.idx", "model.journal", "model.safetensors", "config.json"]
    chosen = pick(names)
    assert chosen.format == "checkpoint"
    assert sorted(chosen.names) == ["model.bin", "model.idx"]


def test_a_config_that_names_code_is_refused(first, tmp_path, monkeypatch):
    """Digests say what a file is, not that one of ours made it."""
    source = write_random_safetensors(tmp_path / "other")
    (source / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    monkeypatch.setattr(side_files, "_CODE_KEYS", frozenset())
    evil = convert(open_folder(source, model="m"), tmp_path / "evil")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"config\.json of this checkpoint names code"):
        plan_layout(open_folder(evil.bin_path.parent, model="m"))
