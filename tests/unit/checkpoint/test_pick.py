"""Which files are the model, from their names alone."""

from __future__ import annotations

import pytest

from serverlessllm.checkpoint.sources.pick import SHARD_MAP, TORCH_SHARD_MAP, pick
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


TORCH_SHARDS = [f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2)]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt", "weights.bin"])
def test_the_only_pytorch_file(name: str) -> None:
    chosen = pick([name, "config.json", "optimizer.pt", "training_args.bin", "rng_state_0.pth"])
    assert chosen.format == "torch"
    assert chosen.names == ("config.json", name)


def test_pytorch_comes_last() -> None:
    files = ["pytorch_model.bin", "m.gguf"]
    assert pick(files).format == "gguf"
    assert pick([*files, "model.safetensors"]).format == "safetensors"


def test_pytorch_shards() -> None:
    chosen = pick([*TORCH_SHARDS, TORCH_SHARD_MAP, "scheduler.pt", "other.bin"])
    assert chosen.names == (TORCH_SHARD_MAP, *TORCH_SHARDS)
    assert pick(TORCH_SHARDS).weights == tuple(TORCH_SHARDS)
    with pytest.raises(CheckpointError, match="shard 2 of 2 is missing"):
        pick(TORCH_SHARDS[:1])
    assert pick([*TORCH_SHARDS, TORCH_SHARD_MAP, "pytorch_model.bin"]).shard_map is None


def test_several_pytorch_files_are_listed() -> None:
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth, consolidated\.01\.pth"):
        pick(["consolidated.00.pth", "consolidated.01.pth"])


def test_an_adapter_in_a_pickle() -> None:
    chosen = pick(["adapter_config.json", "adapter_model.bin", "training_args.bin"])
    assert chosen.adapter
    assert chosen.format == "torch"
    assert chosen.weights == ("adapter_model.bin",)


def test_a_plain_pickle_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedCheckpoint, match=r"plain pickles.*\.safetensors"):
        pick(["m.pkl", "config.json"])


def test_what_a_trainer_leaves_is_no_model() -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        pick(
            [
                "optimizer.bin",
                "scheduler.pt",
                "training_args.bin",
                "scaler.pt",
                "random_states_0.pt",
            ]
        )


def test_no_weights() -> None:
    with pytest.raises(CheckpointError, match=r"no \.safetensors, no \.gguf and no PyTorch file"):
        pick(["config.json", "adapter_model.safetensors"])


@pytest.mark.parametrize("name", ["\x1b[2J.bin", "a\n.safetensors", "\udcff.gguf", "\u202e.pt"])
def test_a_name_that_does_not_print_is_passed_over(name: str) -> None:
    assert pick([name, "model.safetensors"]).weights == ("model.safetensors",)
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        pick([name])
