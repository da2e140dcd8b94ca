"""What llama.cpp is said to cost, and what its figures mean."""

from __future__ import annotations

import msgspec

from serverlessllm.backends.base import BackendStats, Node, Offer
from serverlessllm.backends.llamacpp import LlamaCpp
from serverlessllm.checkpoint.index import Chunk, Index, Tensor
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.core.units import MIB

NODE = Node(cpus=2, dram_free_bytes=1 << 30)
INDEX = Index(
    model="m",
    source="file:m.gguf",
    revision="r",
    kind="gguf",
    size_bytes=100 * MIB,
    chunks=(Chunk(blake3="0" * 64, crc32c=0),),
    tensors=tuple(
        Tensor(name=name, dtype="F16", shape=shape, offset=0, size_bytes=64)
        for name, shape in {
            "token_embd.weight": (32000, 512),
            "blk.0.attn_k.weight": (128, 512),
            "blk.0.attn_v.weight": (128, 512),
            "blk.1.attn_qkv.weight": (768, 512),
        }.items()
    ),
)
METRICS = b"""# HELP llamacpp:prompt_tokens_total Number
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 60
llamacpp:prompt_tokens_cached_total 20
llamacpp:tokens_predicted_total 7
llamacpp:n_decode_total 9
llamacpp:requests_processing 2
llamacpp:requests_deferred 1
llamacpp:prompt_tokens_seconds 268.58
"""


def memory_bytes(**options: str) -> int:
    offer = LlamaCpp().can_serve(ModelSpec(model=ModelId("m"), options=options), INDEX, NODE)
    assert isinstance(offer, Offer)
    return offer.memory_bytes


def test_the_cache_is_counted_from_the_shapes_that_fill_it() -> None:
    values_a_token = 128 + 128 + 256
    step_bytes = memory_bytes(context="8192") - memory_bytes(context="4096")
    assert step_bytes == 4096 * values_a_token * 2
    assert memory_bytes(cache_type="q8_0") < memory_bytes()


def test_a_repacked_instance_has_its_own_weights() -> None:
    assert memory_bytes(repack="true") == memory_bytes() + INDEX.size_bytes


def test_a_model_without_known_shapes_still_gets_an_offer() -> None:
    bare = msgspec.structs.replace(INDEX, tensors=())
    assert isinstance(LlamaCpp().can_serve(ModelSpec(model=ModelId("m")), bare, NODE), Offer)


def test_figures() -> None:
    assert LlamaCpp().parse_stats(METRICS) == BackendStats(
        running=2, queued=1, kv_hit_rate=0.25, progress=76
    )
    assert LlamaCpp().parse_stats(b"") == BackendStats(progress=0)
