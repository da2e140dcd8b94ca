"""Tiny random models that real engines load: the raw files that tests are made from.

Needs the `dev` extra (`gguf`, `numpy`), imported when a maker is called.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from serverlessllm.checkpoint.sources.base import MemoryFile, RawCheckpoint

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import numpy.typing as npt

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_WORDS = (
    "the a model answers asks loads wakes sleeps cold warm hot store node agent token layer "
    "reads writes quick slow small big and or of to in is was not one two three four red blue"
)
WORDS = _WORDS.split()

_CONTROL = ("<unk>", "<s>", "</s>")
_FIRST_WORD = len(_CONTROL) + 256
_VOCABULARY = _FIRST_WORD + len(WORDS)
_LOGIT_SCALE = 6.0
_HEADS = 4
_KV_HEADS = 2

Shape = tuple[int, ...]


def write_random_gguf(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    name: str = "random",
    alignment: int = 32,
    gaps: bool = False,
) -> Path:
    """Write a llama-architecture GGUF (F32, about 0.5 MB) that llama.cpp loads and chats with.

    It answers in the words of `WORDS` and hardly ever ends by itself: give `max_tokens`.
    Another `seed` gives other weights of the same shape, more `layers` or `width` (a multiple
    of 16) a bigger file. With `gaps` its last words mark a gap to be filled. Context: 4,096 tokens.
    The same arguments give the same bytes.
    """
    import gguf
    import numpy as np

    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_name(name)
    writer.add_license("apache-2.0")
    _add_shape(writer, layers, width)
    _add_tokenizer(writer)
    for mark, name in enumerate(("pre", "suf", "mid") if gaps else (), start=_VOCABULARY - 3):
        writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", mark)
    for tensor, shape in _llama_tensors(layers, width):
        writer.add_tensor(tensor, _weight(random, tensor, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_shape(writer: gguf.GGUFWriter, layers: int, width: int) -> None:
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_dimension_count(width // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCABULARY)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """SentencePiece with a token a byte, so that it can spell any prompt, and a few words."""
    import gguf

    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    types += [kinds.BYTE] * 256 + [kinds.NORMAL] * len(WORDS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_tokens())
    writer.add_token_scores([0.0] * _FIRST_WORD + [-float(i) for i in range(len(WORDS))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def _tokens() -> list[str]:
    return [*_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *(f"▁{w}" for w in WORDS)]


def _llama_tensors(layers: int, width: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes (rows, columns) as llama.cpp expects them."""
    kv_width = width * _KV_HEADS // _HEADS
    yield "token_embd.weight", (_VOCABULARY, width)
    for layer in range(layers):
        prefix = f"blk.{layer}"
        yield f"{prefix}.attn_norm.weight", (width,)
        yield f"{prefix}.attn_q.weight", (width, width)
        yield f"{prefix}.attn_k.weight", (kv_width, width)
        yield f"{prefix}.attn_v.weight", (kv_width, width)
        yield f"{prefix}.attn_output.weight", (width, width)
        yield f"{prefix}.ffn_norm.weight", (width,)
        yield f"{prefix}.ffn_gate.weight", (2 * width, width)
        yield f"{prefix}.ffn_up.weight", (2 * width, width)
        yield f"{prefix}.ffn_down.weight", (width, 2 * width)
    yield "output_norm.weight", (width,)
    yield "output.weight", (_VOCABULARY, width)


def _weight(random: np.random.Generator, name: str, shape: Shape) -> npt.NDArray[np.float32]:
    """Ones for norms; else a spread that keeps activations near 1 from layer to layer."""
    import numpy as np

    if len(shape) == 1:
        return np.ones(shape, dtype=np.float32)
    weight = random.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)
    if name == "output.weight":  # only words are ever likely: valid UTF-8, no early end
        weight *= np.float32(_LOGIT_SCALE)
        weight[:_FIRST_WORD] = 0
    return weight


class RawTensorData(NamedTuple):
    """A tensor as it goes into a safetensors file: its dtype by that format's name."""

    dtype: str
    shape: Shape
    data: bytes


def write_random_safetensors(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    layers: int = 2,
    width: int = 64,
    dtype: str = "BF16",
    tied: bool = False,
) -> Path:
    """Write a Hugging Face folder of a tiny random llama: config, tokenizer, safetensors.

    `dtype` is `BF16`, `F16` or `F32`. `tied` leaves the head out and says so in the config.
    With several `shards` the tensors are dealt out to them, and a map says which went where.
    The same arguments give the same bytes.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors = {
        theirs: RawTensorData(dtype, shape, _encode(_weight(random, name, shape), dtype))
        for name, shape in _llama_tensors(layers, width)
        if (theirs := hf_name(name)) != "lm_head.weight" or not tied
    }
    _write_shards(folder, tensors, shards)
    for name, content in _hf_files(layers, width, dtype, tied).items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


def safetensors_bytes(
    tensors: Mapping[str, RawTensorData], metadata: Mapping[str, str] | None = None
) -> bytes:
    """One safetensors file, the tensors in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(tensor.data for tensor in tensors.values())
    return len(text).to_bytes(8, "little") + text + data


def raw_checkpoint(files: Mapping[str, bytes]) -> RawCheckpoint:
    """A source of `test/model` whose files are in memory."""
    return RawCheckpoint(
        files={name: MemoryFile(name, data) for name, data in files.items()},
        model="test/model",
        source="memory:test",
        revision="r1",
    )


def _write_shards(folder: Path, tensors: Mapping[str, RawTensorData], shards: int) -> None:
    if shards == 1:
        data = safetensors_bytes(tensors, {"format": "pt"})
        (folder / "model.safetensors").write_bytes(data)
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        (folder / name).write_bytes(safetensors_bytes(part, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, name)
    size = sum(len(tensor.data) for tensor in tensors.values())
    shard_map = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shard_map), encoding="utf-8")


def _encode(weight: npt.NDArray[np.float32], dtype: str) -> bytes:
    import numpy as np

    match dtype:
        case "F32":
            return weight.tobytes()
        case "F16":
            return weight.astype(np.float16).tobytes()
        case "BF16":
            return (weight.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    raise ValueError(f"dtype {dtype!r}: give BF16, F16 or F32")


_HF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """llama.cpp's name of a tensor → Hugging Face's."""
    if name in _HF_NAMES:
        return _HF_NAMES[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_HF_PARTS[part]}.weight"


def _hf_files(layers: int, width: int, dtype: str, tied: bool) -> dict[str, object]:
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _KV_HEADS,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": _VOCABULARY,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": tied,
            "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 4096,
            **special,
        },
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": number, "content": token, "special": True, "single_word": False}
                | {"lstrip": False, "rstrip": False, "normalized": False}
                for number, token in enumerate(_CONTROL)
            ],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": {
                "type": "BPE",
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": {token: number for number, token in enumerate(_tokens())},
                "merges": [],
            },
        },
    }
