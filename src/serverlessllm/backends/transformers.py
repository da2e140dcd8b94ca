"""transformers: a model's own PyTorch code, on weights that it reads where they lie in DRAM."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec

from serverlessllm.backends.base import (
    BackendStats,
    Launch,
    LaunchPlan,
    Node,
    Offer,
    Refusal,
)
from serverlessllm.backends.dialect import GENERATION, Dialect, Operation, PlainDialect
from serverlessllm.backends.options import parse_options
from serverlessllm.checkpoint.index import KIND_TENSORS, Index, Tensor
from serverlessllm.checkpoint.quantized import private_bytes
from serverlessllm.core.ids import Address
from serverlessllm.core.models import ModelSpec
from serverlessllm.core.units import MIB

MODULE = "serverlessllm.backends.inside.transformers"
_TEMPLATE = MODULE.rpartition(".")[2]
_SCRATCH_BYTES = 320 * MIB
"""What one instance has of its own: interpreter, pages of the libraries it has written to,
activations, and the batch's indices."""
_EMBEDDING_ROWS = 64
"""Rows of a KV projection that are taken for granted where no name says how many there are."""

ENVIRONMENT = {
    # Threads that spin for each other take the core from who has work. Measured on two cores in ms
    # a token, quiet and beside two busy neighbours: libgomp's default spin 38 and 1,940, spin
    # 10,000 38 and 610, spin 1,000 44 and 200, spin 300 50 and 210.
    "GOMP_SPINCOUNT": "1000",
    "TOKENIZERS_PARALLELISM": "false",
    # An engine never goes to the network: what it needs is in the checkpoint.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Weights are views: threads to load them would only cost their start.
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
}
"""Set before torch is imported: in the template, or in the process that is executed."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_UNREADABLE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""Element types that torch has no name for."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
_KV = re.compile(r"(?:^|\.)(?:k_proj|v_proj|kv_b_proj|k|v|key|value)\.weight$")
_FUSED_QKV = re.compile(r"(?:^|\.)(?:qkv_proj|c_attn|query_key_value|Wqkv|qkv)\.weight$")


class TransformersOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `ModelSpec.options` may say for this backend."""

    context: Annotated[int, msgspec.Meta(ge=256, le=1 << 20)] = 8192
    """Tokens of KV cache that all requests share; a model's own limit holds for each."""
    slots: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    """Requests decoded together."""
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """0: the node's cores."""
    batch: Annotated[int, msgspec.Meta(ge=64, le=8192)] = 256
    """Tokens of prompts and answers that are computed at once."""
    page: Annotated[int, msgspec.Meta(ge=4, le=1024)] = 16
    """Tokens of a page of the KV cache: the grain at which prompts share their beginnings."""
    embeddings: bool = True
    """Offer `/v1/embeddings` too: the mean of the last hidden states, of length 1."""


class EngineParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The argument of the engine's process, as JSON."""

    socket: str
    model: str
    model_path: str
    index_path: str
    run_dir: str
    device: str
    context: int
    slots: int
    threads: int
    batch: int
    page: int
    embeddings: bool


class Transformers:
    """Serves what the transformers library can, on the checkpoint's own element type."""

    name = "transformers"
    stats_path = "/stats"

    def installed(self) -> Refusal | None:
        for module in ("torch", "transformers", "compressed_tensors", "llguidance"):
            if importlib.util.find_spec(module) is None:
                return Refusal(reason="not installed: pip install 'serverlessllm[torch]'")
        return None

    def can_serve(self, spec: ModelSpec, index: Index | None, node: Node) -> Offer | Refusal:
        if spec.command or spec.url:
            return Refusal(reason="the model names a command or a URL: that is backend 'openai'")
        if index is None:
            return Refusal(reason="needs a checkpoint: give the model a source")
        reason = _unfit(index)
        if reason is not None:
            return Refusal(reason=reason)
        options = parse_options(spec.options, TransformersOptions)
        if isinstance(options, Refusal):
            return options
        on_cpu = node.devices == ("cpu",)
        own = _expert_bytes(index) + private_bytes(index) if on_cpu else index.size_bytes
        cache = _cache_bytes(index, options)
        return Offer(
            memory_bytes=own + cache + _SCRATCH_BYTES,
            slots=options.slots,
            layered=on_cpu,
            template=_TEMPLATE,
        )

    def launch(self, launch: Launch) -> LaunchPlan:
        options = parse_options(launch.spec.options, TransformersOptions)
        if isinstance(options, Refusal) or launch.model_path is None or launch.index_path is None:
            raise AssertionError("launch without can_serve")
        socket = launch.run_dir / "backend.sock"
        parameters = EngineParameters(
            socket=str(socket),
            model=launch.spec.model,
            model_path=str(launch.model_path),
            index_path=str(launch.index_path),
            run_dir=str(launch.run_dir),
            device=launch.node.devices[0],
            context=options.context,
            slots=options.slots,
            threads=options.threads or launch.node.cpus,
            batch=options.batch,
            page=options.page,
            embeddings=options.embeddings,
        )
        argument = msgspec.json.encode(parameters).decode()
        return LaunchPlan(
            command=(sys.executable, "-I", "-m", MODULE, argument),
            environment=ENVIRONMENT,
            address=Address(f"unix:{socket}"),
            template=_TEMPLATE,
            tells_ready=True,
        )

    def dialect(self, spec: ModelSpec) -> Dialect:
        """`backends.dialect.Speaks`: our own server has what the library can do."""
        options = parse_options(spec.options, TransformersOptions)
        if isinstance(options, Refusal):
            raise AssertionError("dialect without can_serve")
        has = GENERATION | {Operation.TOKENIZE, Operation.DETOKENIZE}
        return PlainDialect(operations=has if options.embeddings else has - {Operation.EMBEDDINGS})

    def parse_stats(self, body: bytes) -> BackendStats:
        return msgspec.json.decode(body, type=BackendStats)


def _unfit(index: Index) -> str | None:
    """Why the library cannot run this checkpoint; None when nothing speaks against it."""
    if index.kind != KIND_TENSORS:
        return f"serves checkpoints of tensors only, and this one is {index.kind!r}"
    if index.base is not None:
        return f"this is an adapter: serve its base model, {index.base!r}, instead"
    files = {file.name for file in index.side_files}
    if "config.json" not in files:
        return "the checkpoint has no config.json, so nothing says how its tensors are connected"
    if files.isdisjoint(_TOKENIZERS):
        return "the checkpoint has no tokenizer: give it the source's tokenizer.json"
    if index.architecture is None:
        return "its config.json names no architecture"
    known = architectures()
    if known and index.architecture not in known:
        return (
            f"the installed transformers has no causal language model {index.architecture!r}; "
            "code that comes with a checkpoint is never run"
        )
    odd = sorted({tensor.dtype for tensor in index.tensors} & _UNREADABLE)
    if odd:
        return f"torch cannot read tensors of {odd[0]}"
    return None


@lru_cache(maxsize=1)
def architectures() -> frozenset[str]:
    """Causal language models of the installed library, read from its source: importing it takes
    seconds. Empty when its source is not where it was."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    try:
        text = source.read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    _, _, rest = text.partition("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")
    table, _, _ = rest.partition("\n)\n")
    return frozenset(re.findall(r'\(\s*"[^"]+",\s*"(\w+)"\s*,?\s*\)', table))


def _expert_bytes(index: Index) -> int:
    """Experts that lie apart in the checkpoint are joined in memory, the one copy there is."""
    return sum(tensor.size_bytes for tensor in index.tensors if _EXPERT.search(tensor.name))


def _cache_bytes(index: Index, options: TransformersOptions) -> int:
    """KV cache and attention mask, from the shapes of the projections that fill the cache."""
    rows = sum(map(_kv_rows, index.tensors)) or _EMBEDDING_ROWS * len(index.tensors)
    sizes = [_element_bytes(tensor) for tensor in index.tensors if len(tensor.shape) > 1]
    element = max(2, min(sizes, default=4))
    tokens = options.context + 2 * options.page
    mask = options.batch * (tokens + options.batch)
    return math.ceil((rows * tokens + mask) * element)


def _kv_rows(tensor: Tensor) -> int:
    """Numbers that a token adds to the cache by this projection."""
    if len(tensor.shape) != 2:
        return 0
    rows, columns = tensor.shape
    if _KV.search(tensor.name):
        return rows
    if _FUSED_QKV.search(tensor.name):  # queries are as wide as the model; GPT-2 has it transposed
        return max(rows, columns) - min(rows, columns)
    return 0


def _element_bytes(tensor: Tensor) -> int:
    elements = math.prod(tensor.shape)
    return tensor.size_bytes // elements if elements else 4
