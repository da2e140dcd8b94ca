"""llama.cpp, by the `xllamacpp` wheel: maps a GGUF where it lies in DRAM and serves it itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from serverlessllm.backends.base import (
    BackendStats,
    Launch,
    LaunchPlan,
    Node,
    Offer,
    Refusal,
)
from serverlessllm.backends.llamacpp_dialect import LlamaDialect
from serverlessllm.backends.options import parse_options
from serverlessllm.backends.tools import PROLOGUE
from serverlessllm.checkpoint.index import Index
from serverlessllm.core.ids import Address
from serverlessllm.core.models import ModelSpec
from serverlessllm.core.units import MIB

_INSIDE = Path(__file__).with_name("inside") / "llamacpp.py"
_SCRATCH_BYTES = 192 * MIB
"""Compute buffers, tokenizer and code of one instance, generously."""
_CACHE_TYPE_BYTES = {"f16": 2.0, "q8_0": 34 / 32}

_ENVIRONMENT = {
    # llama.cpp's threads meet at a barrier some hundred times a token. Measured on two cores in
    # tokens/s, quiet and beside one busy neighbour: libgomp's default spin 138 and 31, spin
    # 10,000 138 and 22, spin 300 128 and 48, no spin at all ("passive" alone) 48 and 53.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "300",
}

_Metric = Literal["prompt", "cached", "predicted", "processing", "deferred", "decodes"]
_METRICS: dict[bytes, _Metric] = {
    b"llamacpp:prompt_tokens_total": "prompt",
    b"llamacpp:prompt_tokens_cached_total": "cached",
    b"llamacpp:tokens_predicted_total": "predicted",
    b"llamacpp:n_decode_total": "decodes",
    b"llamacpp:requests_processing": "processing",
    b"llamacpp:requests_deferred": "deferred",
}


class LlamaOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `ModelSpec.options` may say for this backend."""

    context: Annotated[int, msgspec.Meta(ge=256, le=1 << 20)] = 8192
    """Tokens of KV cache that all slots share; a model's own limit holds for each request."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    """Requests decoded together."""
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """0: the node's cores."""
    gpu_layers: Annotated[int, msgspec.Meta(ge=-1, le=10_000)] = -1
    """Layers on the device; -1: all of them."""
    cache_type: Literal["f16", "q8_0"] = "f16"
    """Of the KV cache."""
    embeddings: bool = True
    """Offer `/v1/embeddings` too (costs a chat nothing, measured); its inputs then have at most
    `batch` tokens."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """How token embeddings become one."""
    batch: Annotated[int, msgspec.Meta(ge=32, le=8192)] = 512
    """Tokens of a prompt that are computed at once."""
    rerank: bool = False
    """The model is a reranker: it offers `/v1/rerank`, and neither chats nor embeddings."""
    scored_tokens_max: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 1024
    """Tokens of a prompt whose own log probabilities may be asked for (`echo` with `logprobs`):
    each costs a decoding step of its own."""
    repack: bool = False
    """Copy the weights into a layout that some CPUs compute faster on: a second copy in memory
    for each instance, and a slower start."""
    warmup: bool = False
    """Run an empty batch before ready: 0.5 s of start, and no faster first token, measured."""


class LlamaCpp:
    """The embedded default for GGUF checkpoints."""

    name = "llamacpp"
    stats_path = "/metrics"

    def installed(self) -> Refusal | None:
        if importlib.util.find_spec("xllamacpp") is None:
            return Refusal(reason="not installed: pip install 'serverlessllm[llamacpp]'")
        return None

    def can_serve(self, spec: ModelSpec, index: Index | None, node: Node) -> Offer | Refusal:
        del node
        if spec.command or spec.url:
            return Refusal(reason="the model names a command or a URL: that is backend 'openai'")
        if index is None:
            return Refusal(reason="needs a checkpoint: give the model a source")
        if index.kind != "gguf":
            return Refusal(reason=f"serves GGUF checkpoints only, and this one is {index.kind!r}")
        options = parse_options(spec.options, LlamaOptions)
        if isinstance(options, Refusal):
            return options
        cache_bytes = options.context * _cache_bytes_a_token(index, options.cache_type)
        weights_bytes = index.size_bytes if options.repack else 0
        return Offer(
            memory_bytes=int(cache_bytes) + _SCRATCH_BYTES + weights_bytes, slots=options.slots
        )

    def launch(self, launch: Launch) -> LaunchPlan:
        options = parse_options(launch.spec.options, LlamaOptions)
        if isinstance(options, Refusal) or launch.model_path is None:
            raise AssertionError("launch without can_serve")
        socket = launch.run_dir / "backend.sock"  # its server knows a unix socket by `.sock`
        parameters = msgspec.to_builtins(options) | {
            "socket": str(socket),
            "model_path": str(launch.model_path),
            "model": launch.spec.model,
            "threads": options.threads or launch.node.cpus,
            "chat_prologue": PROLOGUE,
            "gpu_layers": 0 if launch.node.devices == ("cpu",) else options.gpu_layers,
        }
        return LaunchPlan(
            command=(sys.executable, "-I", str(_INSIDE), msgspec.json.encode(parameters).decode()),
            environment=_ENVIRONMENT,
            address=Address(f"unix:{socket}"),
            tells_ready=True,
        )

    def dialect(self, spec: ModelSpec) -> LlamaDialect:
        """`backends.dialect.Speaks`."""
        options = parse_options(spec.options, LlamaOptions)
        if isinstance(options, Refusal):
            raise AssertionError("dialect without can_serve")
        return LlamaDialect(
            embeddings=options.embeddings,
            rerank=options.rerank,
            scored_tokens_max=options.scored_tokens_max,
            slots=options.slots,
        )

    def parse_stats(self, body: bytes) -> BackendStats:
        """Prometheus text. `progress` counts decode calls: a prompt's batches count too."""
        values: dict[_Metric, int] = dict.fromkeys(_METRICS.values(), 0)
        for line in body.splitlines():
            name, _, value = line.partition(b" ")
            key = _METRICS.get(name)
            if key is not None:
                values[key] = int(float(value))
        seen = values["prompt"] + values["cached"]
        return BackendStats(
            running=values["processing"],
            queued=values["deferred"],
            kv_hit_rate=values["cached"] / seen if seen else 0.0,
            progress=values["decodes"] + values["predicted"] + values["prompt"],
        )


def _cache_bytes_a_token(index: Index, cache_type: str) -> float:
    """KV cache of one token, from the shapes of the projections that fill it."""
    tensors = {tensor.name: tensor for tensor in index.tensors}
    embedding = tensors.get("token_embd.weight")
    width = min(embedding.shape) if embedding else 4096
    values = 0
    for name, tensor in tensors.items():
        elements = 1
        for size in tensor.shape:
            elements *= size
        if name.endswith(("attn_k.weight", "attn_v.weight", "attn_kv_a_mqa.weight")):
            values += elements // width
        elif name.endswith("attn_qkv.weight"):  # query rows are as wide as the embedding
            values += max(0, elements // width - width)
    return values * _CACHE_TYPE_BYTES[cache_type]
