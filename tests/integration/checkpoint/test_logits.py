"""A converted model answers as the original does: the same logits, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.integration.checkpoint.hf_models import (
    GROUPED,
    SIZES,
    converted_model,
    logits,
    original,
    to_pytorch,
    write_model,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources.base import open_file, open_folder
from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.hf import demo_gguf, smollm2_folder

MODELS = {
    "llama in F32": (LlamaConfig(**GROUPED), torch.float32),
    "llama in BF16, biased": (LlamaConfig(**GROUPED, attention_bias=True), torch.bfloat16),
    "qwen3 in BF16, tied": (Qwen3Config(**GROUPED, tie_word_embeddings=True), torch.bfloat16),
    "gpt2 in F32, tied": (
        GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4),
        torch.float32,
    ),
    "neox in F16": (GPTNeoXConfig(**SIZES), torch.float16),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    made = {
        name: write_model(root / name, config, dtype) for name, (config, dtype) in MODELS.items()
    }
    config = LlamaConfig(**GROUPED)
    made["llama in shards"] = write_model(
        root / "shards", config, torch.bfloat16, shard_size="100KB"
    )
    assert len(list(made["llama in shards"].glob("*.safetensors"))) > 2
    return made


def check_equal(folder: Path, out: Path) -> None:
    """What `folder` becomes answers as the library's own loading of it, and copies no weight."""
    done = convert(open_folder(folder, model="test/model"), out)
    model, mapping = converted_model(done)
    expected = logits(original(folder))
    assert expected.isfinite().all()
    assert expected.float().std() > 0.01
    assert torch.equal(logits(model), expected)
    assert all(mapping.span(parameter) is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", [*MODELS, "llama in shards"])
def test_from_safetensors(name, sources, tmp_path):
    check_equal(sources[name], tmp_path / "out")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_from_pytorch(name, shards, sources, tmp_path):
    folder = to_pytorch(sources[name], tmp_path / "pytorch", shards=shards)
    check_equal(folder, tmp_path / "out")


def test_pytorch_and_safetensors_give_one_bin(sources, tmp_path):
    source = sources["llama in F32"]
    folder = to_pytorch(source, tmp_path / "pytorch")
    one = convert(open_folder(source, model="m", source="s"), tmp_path / "one")
    other = convert(open_folder(folder, model="m", source="s"), tmp_path / "other")
    assert one.id == other.id


def test_from_a_gguf_dequantised(tmp_path):
    source = write_random_gguf(tmp_path / "source.gguf")
    done = convert(open_file(source, model="test/gguf"), tmp_path / "out")
    named = tmp_path / "converted.gguf"
    os.link(done.bin_path, named)  # the library goes by the name
    expected, found = (
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name))
        for path in (source, named)
    )
    assert expected.std() > 0.01
    assert torch.equal(found, expected)


def test_of_a_real_model(tmp_path):
    """SmolLM2-135M, safetensors."""
    source = smollm2_folder(tmp_path)
    check_equal(source, tmp_path / "out")


# The engine logs to both streams of its process and ends it when it dislikes a file.
_LOG_PROBABILITIES = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 256
params.warmup = False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
body = json.dumps({
    "prompt": "The capital of France is", "n_predict": 4, "n_probs": 64, "temperature": 0,
}).encode()
request = urllib.request.Request(
    server.listening_address + "/completion", body, {"content-type": "application/json"})
with urllib.request.urlopen(request) as answer:
    said = json.load(answer)["completion_probabilities"]
with open(sys.argv[2], "w") as file:
    json.dump(said, file)
"""


def test_from_a_real_gguf_natively(tmp_path):
    """SmolLM2-135M in llama.cpp: the 64 best log-probabilities of each of four tokens."""
    source = demo_gguf()
    done = convert(open_file(source, model="test/gguf"), tmp_path / "out")
    said = []
    for path in (source, done.bin_path):
        told = tmp_path / "said.json"
        command = [sys.executable, "-c", _LOG_PROBABILITIES, str(path), str(told)]
        ended = subprocess.run(command, capture_output=True, timeout=100)
        assert ended.returncode == 0, ended.stderr[-2000:]
        said.append(json.loads(told.read_text()))
    assert len(said[0]) == 4
    assert all(len(token["top_logprobs"]) == 64 for token in said[0])
    assert said[0] == said[1]
