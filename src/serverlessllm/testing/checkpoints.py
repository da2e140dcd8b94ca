"""Tiny random models that real engines load: the raw files that tests are made from.

Needs the `dev` extra (`gguf`, `numpy`), imported when a maker is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
) -> Path:
    """Write a llama-architecture GGUF (F32, about 0.5 MB) that llama.cpp loads and chats with.

    It answers in the words of `WORDS` and hardly ever ends by itself: give `max_tokens`.
    Another `seed` gives other weights of the same shape, more `layers` or `width` (a multiple
    of 16) a bigger file. Context: 4,096 tokens. The same arguments give the same bytes.
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
    tokens = [*_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *(f"▁{w}" for w in WORDS)]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    types += [kinds.BYTE] * 256 + [kinds.NORMAL] * len(WORDS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * _FIRST_WORD + [-float(i) for i in range(len(WORDS))])
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


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
