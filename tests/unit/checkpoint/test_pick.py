"""Which files are the model, from their names alone."""

from __future__ import annotations

import pytest

from serverlessllm.checkpoint.sources.pick import SHARD_MAP, pick
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint

SHARDS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_safetensors_come_before_gguf_and_pickles() -> None:
    chosen = pick(["model.safetensors", "m.gguf", "pytorch_model.bin", "config.json", "x.py"])
    assert chosen.format == "safetensors"
    assert chosen.names == ("config.json", "model.safetensors")


def test_one_file_comes_before_its_shards() -> None:
    assert pick([*SHARDS, SHARD_MAP, "model.safetensors"]).weights == ("model.safetensors",)


def test_shards_with_their_map() -> None:
    chosen = pick([*SHARDS, SHARD_MAP, "consolidated.safetensors", "tokenizer.json"])
    assert chosen.weights == tuple(SHARDS)
    assert chosen.names == (SHARD_MAP, "tokenizer.json", *SHARDS)


def test_shards_without_a_map_if_none_is_missing() -> None:
    assert pick(SHARDS).weights == tuple(SHARDS)
    with pytest.raises(CheckpointError, match="shard 2 of 3"):
        pick([SHARDS[0], SHARDS[2]])
    with pytest.raises(CheckpointError, match="shard 1 of 3"):
        pick([SHARDS[2]])


def test_one_safetensors_of_any_name() -> None:
    assert pick(["weights.safetensors", "adapter_model.safetensors"]).weights == (
        "weights.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors"):
        pick(["a.safetensors", "b.safetensors"])


def test_one_gguf() -> None:
    assert pick(["m.gguf", "mmproj-m.gguf", "README.md"]).weights == ("m.gguf",)
    assert pick(["m-00001-of-00001.gguf"]).weights == ("m-00001-of-00001.gguf",)


def test_several_ggufs_are_listed() -> None:
    with pytest.raises(CheckpointError, match=r"a-q4\.gguf, a-q8\.gguf.*name one"):
        pick(["a-q8.gguf", "a-q4.gguf"])
    with pytest.raises(CheckpointError, match="name one"):
        pick(["a.gguf", "b-00001-of-00002.gguf"])


def test_a_split_gguf_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="llama-gguf-split --merge"):
        pick(["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt", "m.pth", "m.ckpt"]
)
def test_pickles_are_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"pickles.*\.safetensors"):
        pick([name, "config.json"])


def test_no_weights() -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors and no \.gguf"):
        pick(["config.json", "adapter_model.safetensors"])
