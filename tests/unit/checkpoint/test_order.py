"""Execution order from names."""

from __future__ import annotations

import random

import pytest

from serverlessllm.checkpoint.order import Phase, execution_key, place

LLAMA = [
    "model.embed_tokens.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.experts.2.w1.weight",
    "model.layers.0.mlp.experts.10.w1.weight",
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.10.self_attn.q_norm.weight",
    "model.norm.weight",
    "lm_head.weight",
]
GPT2 = ["wpe.weight", "wte.weight", "h.0.ln_1.weight", "h.11.attn.c_attn.weight", "ln_f.weight"]
GGUF = [
    "rope_freqs.weight",
    "token_embd.weight",
    "blk.0.attn_norm.weight",
    "blk.1.ffn_down.weight",
    "output_norm.weight",
    "output.weight",
]
VISION = [
    "vision_tower.embeddings.patch_embedding.weight",
    "vision_tower.encoder.layers.0.mlp.fc1.weight",
    "language_model.model.layers.0.mlp.up_proj.weight",
    "language_model.lm_head.weight",
]
T5 = [
    "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi.weight",
    "decoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.final_layer_norm.weight",
    "encoder.final_layer_norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("names", [LLAMA, GPT2, GGUF, VISION, T5], ids=lambda names: names[0])
def test_sorts_into_execution_order(names: list[str]) -> None:
    shuffled = names.copy()
    random.Random(3).shuffle(shuffled)
    assert sorted(shuffled, key=execution_key) == names


@pytest.mark.parametrize(
    ("name", "phase", "layer"),
    [
        ("model.embed_tokens.weight", Phase.EMBEDDING, "embedding"),
        ("embeddings.LayerNorm.weight", Phase.EMBEDDING, "embedding"),
        ("token_embd_norm.weight", Phase.EMBEDDING, "embedding"),
        ("model.layers.31.mlp.down_proj.weight", Phase.LAYER, "model.layers.31"),
        ("transformer.h.3.attn.weight", Phase.LAYER, "transformer.h.3"),
        ("blk.7.ffn_up.weight", Phase.LAYER, "blk.7"),
        ("model.norm.weight", Phase.NORM, "norm"),
        ("output_norm.weight", Phase.NORM, "norm"),
        ("output.weight", Phase.HEAD, "head"),
        ("lm_head.weight", Phase.HEAD, "head"),
        ("score.weight", Phase.HEAD, "head"),
        ("mystery", Phase.EMBEDDING, "embedding"),
    ],
)
def test_places(name: str, phase: Phase, layer: str) -> None:
    assert place(name).phase is phase
    assert place(name).name == layer
