"""What transformers is said to serve, what it costs, and how it is started."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from serverlessllm.backends.base import BackendStats, Launch, Node, Offer, Refusal
from serverlessllm.backends.transformers import Transformers, architectures
from serverlessllm.checkpoint.index import Chunk, Index, SideFile, Tensor
from serverlessllm.core.ids import InstanceId, ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.core.units import MIB

NODE = Node(cpus=2, dram_free_bytes=1 << 30)
GPU = Node(cpus=2, dram_free_bytes=1 << 30, devices=("cuda:0",))
MODEL = ModelId("m")
replace = msgspec.structs.replace


def tensors(**shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            name=name.replace("__", "."),
            dtype="BF16",
            shape=shape,
            offset=0,
            size_bytes=2 * shape[0] * (shape[1] if len(shape) > 1 else 1),
        )
        for name, shape in shapes.items()
    )


INDEX = Index(
    model="m",
    source="file:m",
    revision="r",
    architecture="LlamaForCausalLM",
    kind="tensors",
    size_bytes=100 * MIB,
    chunks=(Chunk(blake3="0" * 64, crc32c=0),),
    tensors=tensors(
        model__embed_tokens__weight=(32000, 512),
        model__layers__0__self_attn__q_proj__weight=(512, 512),
        model__layers__0__self_attn__k_proj__weight=(128, 512),
        model__layers__0__self_attn__v_proj__weight=(128, 512),
        model__layers__1__attn__c_attn__weight=(512, 1536),
        model__layers__1__norm__weight=(512,),
    ),
    side_files=tuple(
        SideFile(name=name, offset=0, size_bytes=1) for name in ("config.json", "tokenizer.json")
    ),
)


def offer(index: Index = INDEX, node: Node = NODE, **options: str) -> Offer:
    offer = Transformers().can_serve(ModelSpec(model=MODEL, options=options), index, node)
    assert isinstance(offer, Offer), offer
    return offer


def refusal(index: Index | None = INDEX, **spec: object) -> str:
    asked = msgspec.convert({"model": MODEL} | spec, ModelSpec)
    refused = Transformers().can_serve(asked, index, NODE)
    assert isinstance(refused, Refusal)
    return refused.reason


def test_the_cache_is_counted_from_the_shapes_that_fill_it() -> None:
    values_a_token = 128 + 128 + (1536 - 512)
    mask_a_token = 256
    step = offer(context="8192").memory_bytes - offer(context="4096").memory_bytes
    assert step == 4096 * (values_a_token + mask_a_token) * 2


def test_weights_cost_nothing_where_they_lie_but_on_a_device() -> None:
    assert offer(node=GPU).memory_bytes == offer().memory_bytes + INDEX.size_bytes


def test_only_on_a_cpu_it_may_start_before_its_weights_are_whole() -> None:
    assert offer().layered
    assert not offer(node=GPU).layered


def test_experts_that_lie_apart_are_copied_together() -> None:
    experts = tensors(
        **{f"model__layers__0__mlp__experts__{n}__up__weight": (64, 512) for n in (0, 1)}
    )
    more = replace(INDEX, tensors=INDEX.tensors + experts)
    assert offer(more).memory_bytes == offer().memory_bytes + 2 * 64 * 512 * 2


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (None, "needs a checkpoint"),
        (replace(INDEX, kind="gguf"), "'gguf'"),
        (replace(INDEX, base="org/base"), "adapter: serve its base model, 'org/base'"),
        (replace(INDEX, side_files=INDEX.side_files[1:]), "no config.json"),
        (replace(INDEX, side_files=INDEX.side_files[:1]), "no tokenizer"),
        (replace(INDEX, architecture=None), "no architecture"),
        (replace(INDEX, architecture="BertModel"), "no causal language model 'BertModel'"),
        (
            replace(INDEX, tensors=(replace(INDEX.tensors[0], dtype="F4"),)),
            "cannot read tensors of F4",
        ),
    ],
)
def test_what_it_cannot_serve_it_refuses_with_a_reason(index: Index | None, reason: str) -> None:
    assert reason in refusal(index)


def test_it_leaves_commands_and_urls_to_another_backend() -> None:
    assert "'openai'" in refusal(url="http://127.0.0.1:1")
    assert "'openai'" in refusal(command=["serve"])


def test_a_wrong_option_is_named() -> None:
    assert "page" in refusal(options={"page": "1"})
    assert "known options: context, slots" in refusal(options={"turbo": "on"})


def test_the_architectures_are_those_of_the_installed_library() -> None:
    found = architectures()
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"} <= found
    assert len(found) > 100
    assert not any(name.islower() for name in found)


def test_a_launch_names_its_template_and_the_same_command() -> None:
    run_dir = Path("/run/sllm/i")
    plan = Transformers().launch(
        Launch(
            instance=InstanceId("i"),
            spec=ModelSpec(model=MODEL, options={"slots": "2"}),
            index=INDEX,
            model_path=Path("/dev/shm/m.bin"),
            index_path=Path("/dev/shm/m.idx"),
            run_dir=run_dir,
            node=NODE,
            slots=2,
        )
    )
    assert plan.template == "transformers"
    assert plan.command[-2].endswith(f".{plan.template}")
    asked = json.loads(plan.command[-1])
    assert (asked["threads"], asked["slots"], asked["device"]) == (2, 2, "cpu")
    assert plan.address == f"unix:{asked['socket']}"
    assert plan.environment["HF_HUB_OFFLINE"] == "1"


def test_its_figures_are_ours() -> None:
    stats = BackendStats(running=2, queued=1, kv_hit_rate=0.25, progress=9)
    assert Transformers().parse_stats(msgspec.json.encode(stats)) == stats
