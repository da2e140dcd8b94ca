"""The `.idx`: what is in a `.bin`, where, and what its bytes must hash to.

`docs/checkpoint-format.md` is the byte-level specification.
"""

from __future__ import annotations

import msgspec

FORMAT = "sllm-checkpoint"
VERSION = 1
CHUNK_BYTES = 16 * 1024 * 1024
TENSOR_ALIGNMENT_BYTES = 64


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor: `size_bytes` bytes at `offset` of the `.bin`, row-major."""

    name: str
    dtype: str
    """safetensors' name of it (`BF16`, `F8_E4M3`, …), or GGML's for a GGUF (`Q4_1`, …)."""
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class SideFile(msgspec.Struct, frozen=True, kw_only=True):
    """A small file an engine needs beside the tensors (config, tokenizer, chat template)."""

    name: str
    offset: int
    size_bytes: int


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Digests of one chunk of the `.bin`: `chunk_bytes` long, the last one shorter."""

    blake3: str
    """64 hex digits: for bytes that cross a network."""
    crc32c: int
    """For bytes that move between tiers of one machine."""


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """A whole `.idx`."""

    format: str = FORMAT
    version: int = VERSION
    model: str
    source: str
    revision: str
    license: str | None = None
    kind: str
    """`tensors` (the layout of docs/checkpoint-format.md) or `gguf` (the `.bin` is a GGUF file)."""
    size_bytes: int
    """Of the `.bin`."""
    chunk_bytes: int = CHUNK_BYTES
    chunks: tuple[Chunk, ...]
    tensors: tuple[Tensor, ...]
    side_files: tuple[SideFile, ...] = ()
    aliases: dict[str, str] = {}
    """Tied tensors: another name → the name of the tensor that holds its bytes."""
