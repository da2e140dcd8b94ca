"""Quantised folders as the library reads them and as the engine runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.integration.checkpoint.hf_models import (
    GROUPED,
    SIZES,
    converted_model,
    logits,
    original,
    to_pytorch,
    write_model,
)
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

import serverlessllm.backends.inside.quantize as quantize_package
from serverlessllm.backends.inside.quantize.evaluate import check_possible
from serverlessllm.backends.inside.quantize.folder import write_folder
from serverlessllm.backends.inside.quantize.messages import (
    Failed,
    Message,
    QuantizeRequest,
    Report,
)
from serverlessllm.backends.inside.quantize.source import Source, choose, skeleton
from serverlessllm.backends.inside.transformers.mapping import Mapping
from serverlessllm.backends.inside.transformers.weights import Weights
from serverlessllm.checkpoint.convert import Converted, convert
from serverlessllm.checkpoint.index import Quantization
from serverlessllm.checkpoint.quantized import private_bytes, scheme
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.errors import CheckpointError, OutOfSpace, UnsupportedCheckpoint
from serverlessllm.testing.checkpoints import write_random_gguf

MODELS = {
    "llama": (LlamaConfig(**GROUPED), torch.bfloat16),
    "biased, in F32": (LlamaConfig(**GROUPED, attention_bias=True), torch.float32),
    "tied": (Qwen3Config(**GROUPED, tie_word_embeddings=True), torch.bfloat16),
    "neox, in F16": (GPTNeoXConfig(**SIZES), torch.float16),
}
SCHEMES = [("int8", None), ("int4", None), ("int4", 16), ("int8", 32)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {
        name: write_model(root / name, config, dtype, shard_size="150KB")
        for name, (config, dtype) in MODELS.items()
    }


def quantize(path: Path, folder: Path, how: str, group_size: int | None = None) -> Report:
    folder.mkdir()
    source = Source(path)
    chosen, kept = choose(source, skeleton(source))
    told: list[tuple[int, int]] = []
    report = write_folder(
        source, chosen, kept, scheme(how, group_size), folder, lambda *at: told.append(at)
    )
    assert told[-1] == (report.source_bytes, report.source_bytes)
    return report


def convert_quantized(folder: Path, out: Path, report: Report) -> Converted:
    done = Quantization(
        scheme=report.scheme,
        library=report.library,
        group_size=report.group_size,
        error=report.error,
    )
    return convert(open_folder(folder, model="m", source="s"), out, quantization=done)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def restored(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """A weight as docs/checkpoint-format.md says that it is stored, in full precision."""
    scale = tensors[f"{name}_scale"].double().numpy()
    if name in tensors:
        weight, zero = tensors[name].numpy().astype(int), np.zeros(scale.shape, int)
    else:
        shifts = np.arange(8) * 4
        words = tensors[f"{name}_packed"].numpy().view(np.uint32)
        rows, columns = tensors[f"{name}_shape"].tolist()
        weight = (words[:, :, None] >> shifts & 15).reshape(rows, -1)[:, :columns].astype(int) - 8
        words = tensors[f"{name}_zero_point"].numpy().view(np.uint32)
        zero = (words.T[:, :, None] >> shifts & 15).reshape(scale.shape[1], -1).T[:rows]
        zero = zero.astype(int) - 8
    rows, groups = scale.shape
    steps = weight.reshape(rows, groups, -1) - zero[:, :, None]
    full: np.ndarray = (steps * scale[:, :, None]).reshape(rows, -1)
    return full


@pytest.mark.parametrize(("how", "group_size"), SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_what_the_library_reads(name, how, group_size, sources, tmp_path):
    report = quantize(sources[name], tmp_path / "folder", how, group_size)
    model = original(tmp_path / "folder")  # from_pretrained, nothing of ours
    expected = original(sources[name])
    before, tensors = stored(sources[name]), stored(tmp_path / "folder")
    lost = held = 0.0
    for weight in report.quantized:
        exact, rounded = before[weight].double().numpy(), restored(tensors, weight)
        # Half a step, a clipped end, and the last bit of a scale.
        step = tensors[f"{weight}_scale"].double().numpy().max()
        assert np.abs(rounded - exact).max() < (0.75 if how == "int8" else 2.5) * step
        lost, held = lost + ((rounded - exact) ** 2).sum(), held + (exact**2).sum()
        expected.get_parameter(weight).data = torch.from_numpy(rounded).to(expected.dtype)
    # What is restored is rounded to the model's own type once more.
    assert report.error == pytest.approx((lost / held) ** 0.5, rel=0.08)
    assert report.error < (0.012 if how == "int8" else 0.1)
    assert report.worst.error >= report.error
    assert report.worst.name in report.quantized
    for kept in report.kept:
        assert torch.equal(tensors[kept], before[kept])
    # Restored in the model's own type, so to its last bits.
    torch.testing.assert_close(logits(model), logits(expected), rtol=0.05, atol=0.05)


def test_the_weights_of_the_layers_are_quantised_and_no_others(sources, tmp_path):
    report = quantize(sources["llama"], tmp_path / "folder", "int8")
    assert len(report.quantized) == 2 * 7
    assert all(name.startswith("model.layers.") for name in report.quantized)
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= {*report.kept}
    assert sum("layernorm" in name for name in report.kept) == 4
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize(("how", "group_size"), SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_the_engine_runs_it_where_it_lies(name, how, group_size, sources, tmp_path):
    report = quantize(sources[name], tmp_path / "folder", how, group_size)
    done = convert_quantized(tmp_path / "folder", tmp_path / "out", report)
    model, mapping = converted_model(done)
    assert all(mapping.span(parameter) is not None for parameter in model.parameters())
    expected = logits(original(tmp_path / "folder")).double()
    for _ in range(2):  # the first call prepares
        found = logits(model).double()
        assert found.dtype is torch.float64
        error = (found - expected).norm() / expected.norm()
        assert error < (0.03 if MODELS[name][1] is torch.bfloat16 else 1e-6)
    one = logits(model, torch.tensor([[5]]))  # a single row: the kernels' own case
    alone = logits(original(tmp_path / "folder"), torch.tensor([[5]]))
    assert (one.double() - alone.double()).norm() / alone.double().norm() < 0.03
    in_place = all(mapping.span(parameter) is not None for parameter in model.parameters())
    assert in_place == (MODELS[name][1] is torch.bfloat16 and (how, group_size) in SCHEMES[:2])
    assert (private_bytes(done.index) == 0) == (in_place and how == "int8")


def test_nothing_is_looked_at_before_the_first_call(sources, tmp_path):
    """So an engine may build the model while its layers are still on their way."""
    report = quantize(sources["llama"], tmp_path / "folder", "int4")
    done = convert_quantized(tmp_path / "folder", tmp_path / "out", report)
    whole = done.bin_path.read_bytes()
    first = done.index.side_files[0].offset
    late = tmp_path / "late.bin"
    late.write_bytes(bytes(first) + whole[first:])
    model = Weights(done.index, Mapping(done.index, os.open(late, os.O_RDONLY)), None, "cpu").model
    with late.open("r+b") as file:
        file.write(whole)
    assert torch.equal(logits(model), logits(converted_model(done)[0]))


def test_the_same_input_gives_the_same_checkpoint(sources, tmp_path):
    pytorch = to_pytorch(sources["llama"], tmp_path / "pytorch", shards=2)
    done = []
    for number, path in enumerate((sources["llama"], sources["llama"], pytorch)):
        report = quantize(path, tmp_path / f"folder{number}", "int4")
        done.append(
            convert_quantized(tmp_path / f"folder{number}", tmp_path / f"out{number}", report)
        )
    assert done[0].id == done[1].id == done[2].id
    assert done[0].index.quantization == Quantization(
        scheme="int4",
        library=report.library,
        group_size=32,
        error=report.error,
    )


def test_blocks_do_not_show(sources, tmp_path, monkeypatch):
    whole = quantize(sources["llama"], tmp_path / "whole", "int4")
    monkeypatch.setattr("serverlessllm.backends.inside.quantize.folder._BLOCK_ELEMENTS", 1024)
    parts = quantize(sources["llama"], tmp_path / "parts", "int4")
    assert whole == parts
    for name in ("model-00001-of-00001.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("rows", [16, 17, 31, 32, 33, 47, 48, 56])
def test_blocks_are_whole_rows_and_never_few(rows, tmp_path):
    """No block below what the library can read, whatever is left over."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    matrix = torch.arange(rows * 64, dtype=torch.float32).view(rows, 64)
    save_file({"w": matrix}, folder / "model.safetensors")
    source = Source(folder)
    (tensor,) = source.layout.tensors
    blocks = list(source.rows(tensor, 1024))
    assert torch.equal(torch.cat([block for _, block in blocks]), matrix)
    sizes = [len(block) for _, block in blocks]
    assert [first for first, _ in blocks] == [16 * n for n in range(len(blocks))]
    assert sizes[:-1] == [16] * (len(sizes) - 1)
    assert 16 <= sizes[-1] < 32


def test_a_matrix_of_a_few_rows_is_kept(tmp_path):
    sizes = GROUPED | {"num_key_value_heads": 1, "head_dim": 8, "num_attention_heads": 8}
    source = write_model(tmp_path / "narrow", LlamaConfig(**sizes), torch.bfloat16)
    report = quantize(source, tmp_path / "folder", "int4")
    assert len(report.quantized) == 2 * 5
    assert "model.layers.1.self_attn.k_proj.weight" in report.kept
    model = original(tmp_path / "folder")
    assert logits(model).isfinite().all()


def copy_with(source: Path, folder: Path, **config: object) -> Path:
    """A source, with other values in its config.json."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    said = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_what_is_quantised_already_is_refused(sources, tmp_path):
    quantize(sources["llama"], tmp_path / "once", "int8")
    with pytest.raises(UnsupportedCheckpoint, match=r"already \(compressed-tensors\)"):
        quantize(tmp_path / "once", tmp_path / "twice", "int8")


def test_a_gguf_is_refused(tmp_path):
    path = write_random_gguf(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedCheckpoint, match="quantise the model's safetensors"):
        Source(path)


def test_an_adapter_is_refused(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match="quantise its base"):
        Source(folder)


def test_a_model_without_linear_layers_is_refused(tmp_path):
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=1, n_head=4)
    source = write_model(tmp_path / "gpt2", config, torch.float32)
    with pytest.raises(UnsupportedCheckpoint, match="GPT2LMHeadModel has no Linear weights"):
        quantize(source, tmp_path / "folder", "int8")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["SecretModel"]}, "no 'SecretModel'"),
        ({"architectures": ["json"]}, "no 'json'"),
        ({"architectures": None}, "no ''"),
        ({"model_type": "secret"}, "cannot build a LlamaForCausalLM"),
        ({"hidden_size": "wide"}, "cannot build a LlamaForCausalLM"),
    ],
)
def test_an_architecture_that_nobody_knows_is_refused(config, said, sources, tmp_path):
    source = copy_with(sources["llama"], tmp_path / "odd", **config)
    with pytest.raises(UnsupportedCheckpoint, match=said):
        quantize(source, tmp_path / "folder", "int8")


def test_a_source_without_a_configuration_is_refused(sources, tmp_path):
    source = copy_with(sources["llama"], tmp_path / "bare")
    (source / "config.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"no config\.json"):
        Source(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value, sources, tmp_path):
    source = copy_with(sources["llama"], tmp_path / "broken")
    name = "model.layers.1.mlp.up_proj.weight"
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][3, 5] = value
            save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"{name}.*infinite or not numbers"):
        quantize(source, tmp_path / "folder", "int8")


def test_rows_that_do_not_divide_are_refused_by_name(tmp_path):
    config = LlamaConfig(**GROUPED | {"intermediate_size": 80})
    source = write_model(tmp_path / "odd", config, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight.*--group-size 16 would"):
        quantize(source, tmp_path / "folder", "int4")
    assert quantize(source, tmp_path / "other", "int4", 16).quantized


def run_process(request: QuantizeRequest) -> subprocess.CompletedProcess[bytes]:
    argument = msgspec.json.encode(request).decode()
    return subprocess.run(
        [sys.executable, "-m", quantize_package.__name__, argument],
        stdout=subprocess.PIPE,
        timeout=110,
        check=False,
    )


def test_the_process_of_one_who_is_gone_does_nothing(sources, tmp_path):
    request = QuantizeRequest(
        source=str(sources["llama"]), work=str(tmp_path), parent=1, scheme=scheme("int8", None)
    )
    ended = run_process(request)
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert not list(tmp_path.iterdir())


def test_the_process_says_why_it_refuses(sources, tmp_path):
    request = QuantizeRequest(
        source=str(sources["llama"]),
        work=str(tmp_path),
        parent=os.getpid(),
        scheme=scheme("int4", 256),
    )
    ended = run_process(request)
    assert ended.returncode == 1
    told = msgspec.json.decode(ended.stdout, type=Message)
    assert isinstance(told, Failed)
    assert "q_proj.weight' has rows of 64 weights, which do not divide" in told.message
    assert "--group-size 16 or 32 or 64 would" in told.message
    assert not list(tmp_path.iterdir())


def test_an_evaluation_needs_a_tokenizer_and_memory(sources, tmp_path, monkeypatch):
    source = Source(sources["llama"])
    with pytest.raises(UnsupportedCheckpoint, match="no tokenizer"):
        check_possible(source)
    source.side_files["tokenizer.json"] = bytearray(b"{}")
    check_possible(source)
    monkeypatch.setattr(
        "serverlessllm.backends.inside.quantize.evaluate._available_bytes", lambda: 1 << 20
    )
    with pytest.raises(OutOfSpace, match=r"1\.0 MiB are free"):
        check_possible(source)
