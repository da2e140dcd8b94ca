"""The weights that loaders are measured on, the same in every format, and where they lie."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import BIN_NAME, IDX_NAME, checkpoint_id, encode_index
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.models import CheckpointRef
from serverlessllm.loader.budget import whole_pages
from serverlessllm.loader.settings import LoaderSettings

ROOT = Path(__file__).parents[1]
HIDDEN, INNER, KV, VOCABULARY = 2048, 5632, 256, 32000
"""TinyLlama's shapes."""
_ELEMENT_BYTES = 2
_EMBEDDING_BYTES = VOCABULARY * HIDDEN * _ELEMENT_BYTES


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Two checkpoints of equal bytes, and where a loader of ours keeps them."""

    folder: Path
    """Of the weights, in every format."""
    work: Path
    """The nvme tier."""
    dram: Path
    checkpoints: tuple[CheckpointRef, CheckpointRef]

    def encode(self) -> str:
        """As an argument of another process."""
        return msgspec.json.encode(self, enc_hook=str).decode()

    @classmethod
    def decode(cls, text: str) -> Place:
        """What `encode` gave."""
        return msgspec.json.decode(text, type=cls, dec_hook=lambda kind, value: kind(value))

    @property
    def store_dir(self) -> Path:
        return self.folder / "store"

    @property
    def data_dir(self) -> Path:
        return self.work

    @property
    def nvme_path(self) -> Path:
        """The first checkpoint's `.bin` in the nvme tier."""
        return self.work / "nvme" / f"{self.checkpoints[0].id}.bin"

    def settings(self, *, nvme: bool = True) -> LoaderSettings:
        """Room for one checkpoint in DRAM, and for both in nvme, or for none there."""
        size = whole_pages(self.checkpoints[0].size_bytes)
        return LoaderSettings(
            dram_dir=str(self.dram),
            dram_budget_bytes=size,
            nvme_dir=str(self.work / ("nvme" if nvme else "none")),
            nvme_budget_bytes=2 * size if nvme else 0,
        )


def make_weights(folder: Path, size_bytes: int) -> tuple[CheckpointRef, CheckpointRef]:
    """Write a Llama of about `size_bytes` in BF16 as safetensors, torch and tensorizer files and
    as checkpoints, unless that was done before."""
    hf, store = folder / "hf", folder / "store" / "bench"
    weights = hf / "model.safetensors"
    if not weights.exists():
        hf.mkdir(parents=True, exist_ok=True)
        _write_llama(hf, max(1, (size_bytes - 2 * _EMBEDDING_BYTES) // _layer_bytes()))
    for name, target, source in (
        ("torch", folder / "model.pt", weights),
        ("tensorizer", folder / "model.tensors", folder / "model.pt"),
    ):
        partial = target.with_suffix(".partial")
        if not target.exists() and peer(name, "save", partial, source).returncode == 0:
            partial.rename(target)
    if not (store / "two" / IDX_NAME).exists():
        _convert(hf, store)
    return _ref(store / "one"), _ref(store / "two")


def peer(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script of a peer in its own environment."""
    python = ROOT / (".venv" if name == "serverlessllm" else f".venvs/{name}") / "bin" / "python"
    return subprocess.run(
        [str(python), "-m", f"bench.peers.with_{name}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", (KV, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", (KV, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INNER)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _layer_bytes() -> int:
    return (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * INNER * HIDDEN) * _ELEMENT_BYTES


def _write_llama(folder: Path, layers: int) -> None:
    """Random bits: no disk or file system can make them fewer. The same each time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    sizes = []
    for name, shape in _shapes(layers):
        size = _ELEMENT_BYTES
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        sizes.append(size)
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = random.Random(layers)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": KV * 32 // HIDDEN,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    partial = folder / "model.partial"
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in sizes:
            file.write(source.randbytes(size))
    partial.rename(folder / "model.safetensors")


def _convert(source: Path, store: Path) -> None:
    """The checkpoint, and a second one of the same bytes by another name."""
    one, two = store / "one", store / "two"
    for folder in (one, two):
        folder.mkdir(parents=True, exist_ok=True)
    index = convert(open_folder(source, model="bench/one", revision="one"), one).index
    (two / BIN_NAME).unlink(missing_ok=True)
    (two / BIN_NAME).hardlink_to(one / BIN_NAME)
    renamed = msgspec.structs.replace(index, model="bench/two", revision="two")
    (two / IDX_NAME).write_bytes(encode_index(renamed))


def _ref(folder: Path) -> CheckpointRef:
    return CheckpointRef(
        id=checkpoint_id((folder / IDX_NAME).read_bytes()),
        prefix=f"bench/{folder.name}",
        size_bytes=(folder / BIN_NAME).stat().st_size,
    )
