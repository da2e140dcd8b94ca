"""Small random models of real architectures, as Hugging Face folders, and what they answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from serverlessllm.backends.inside.transformers.mapping import Mapping
from serverlessllm.backends.inside.transformers.weights import Weights
from serverlessllm.checkpoint.convert import Converted

torch.set_num_threads(1)  # threads that wait for a busy neighbour spin

PROMPT = torch.tensor([[5, 9, 3, 200, 41, 7, 7, 250, 12, 0, 99]])
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}


def write_model(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, *, shard_size: str = "1GB"
) -> Path:
    """Save a model of `config` with random weights, biases too, and the scale of real ones."""
    torch.manual_seed(7)
    architecture = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM"}.get(
        config.model_type, f"{config.model_type.capitalize()}ForCausalLM"
    )
    model = getattr(transformers, architecture)(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def to_pytorch(source: Path, folder: Path, *, shards: int = 1) -> Path:
    """The same model as older releases saved it: `pytorch_model*.bin`, a tied tensor under both of
    its names, and one matrix a view into a larger storage."""
    state: dict[str, torch.Tensor] = dict(original(source).state_dict())
    matrix = next(name for name, value in state.items() if value.dim() == 2)
    rows, columns = state[matrix].shape
    storage = torch.zeros(rows + 3, columns, dtype=state[matrix].dtype)
    storage[3:] = state[matrix]
    tied = state[matrix].data_ptr()
    state = {
        name: storage[3:] if value.data_ptr() == tied else value for name, value in state.items()
    }
    names = list(state)
    weight_map: dict[str, str] = {}
    folder.mkdir()
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        file = file if shards > 1 else "pytorch_model.bin"
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        torch.save({name: state[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    if shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(text)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def original(folder: Path) -> PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert isinstance(model, PreTrainedModel)
    return model


def converted_model(done: Converted) -> tuple[PreTrainedModel, Mapping]:
    """The engine's own model of a checkpoint, and the mapping that its weights are views of."""
    mapping = Mapping(done.index, os.open(done.bin_path, os.O_RDONLY))
    return Weights(done.index, mapping, None, "cpu").model, mapping


@torch.inference_mode()
def logits(model: torch.nn.Module, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    found: torch.Tensor = model(prompt).logits
    return found
