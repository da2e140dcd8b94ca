"""The `.idx`: what is in a `.bin`, where, and what its bytes must hash to.

`docs/checkpoint-format.md` is the byte-level specification.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

import msgspec
from blake3 import blake3

from serverlessllm.checkpoint.bounds import (
    ALIGNMENT_BYTES_MAX,
    BIN_BYTES_MAX,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    INDEX_BYTES_MAX,
    check_count,
    check_spans,
    check_text,
    is_power_of_two,
)
from serverlessllm.checkpoint.dtypes import tensor_size_bytes
from serverlessllm.checkpoint.order import place
from serverlessllm.checkpoint.side_files import SIDE_FILE_BYTES_MAX, SIDE_FILES_MAX, is_side_file
from serverlessllm.checkpoint.strict_json import parse_json
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.ids import CheckpointId

FORMAT = "sllm-checkpoint"
VERSION = 1
CHUNK_BYTES = 16 * 1024 * 1024
TENSOR_ALIGNMENT_BYTES = 64

KIND_TENSORS = "tensors"
KIND_GGUF = "gguf"

BIN_NAME = "model.bin"
IDX_NAME = "model.idx"

_ABSENT_IF_NONE = frozenset({"base", "quantization"})
"""Fields that came after version 1 had checkpoints: left out, so that ids stay what they were."""
_BLAKE3 = re.compile(r"[0-9a-f]{64}")


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor: `size_bytes` bytes at `offset` of the `.bin`, row-major."""

    name: str
    dtype: str
    """safetensors' name of it (`BF16`, `F8_E4M3`, …), or GGML's for a GGUF (`Q4_1`, …)."""
    shape: tuple[int, ...]
    """Slowest dimension first (a GGUF's table has it the other way round)."""
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


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors that an engine needs at one point of its run.

    All of them lie within `size_bytes` bytes at `offset`. In kind `tensors` nothing else does; a
    GGUF keeps its own order, so there the span may cover tensors of other layers too.
    """

    name: str
    """`embedding`, `model.layers.7`, `norm`, `head`, …"""
    offset: int
    size_bytes: int
    tensors: tuple[Tensor, ...]


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """What the converter did to the weights: they are not the source's own."""

    scheme: str
    """`int8` or `int4`: weight-only."""
    library: str
    """Who did it, with its version."""
    group_size: int | None = None
    """Weights that share a scale; None: one scale a row."""
    error: float
    """Relative error of the quantised weights: ‖quantised − original‖ ÷ ‖original‖, over all."""


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """A whole `.idx`. Tensors and side files are sorted by offset."""

    format: str = FORMAT
    version: int = VERSION
    model: str
    source: str
    revision: str
    license: str | None = None
    architecture: str | None = None
    """What the source calls it: `LlamaForCausalLM`, or a GGUF's `llama`."""
    base: str | None = None
    """Of an adapter: the model it adapts."""
    quantization: Quantization | None = None
    kind: str
    """`tensors` (the layout of docs/checkpoint-format.md) or `gguf` (the `.bin` is a GGUF file)."""
    size_bytes: int
    """Of the `.bin`."""
    alignment_bytes: int = TENSOR_ALIGNMENT_BYTES
    """Of each tensor's offset; a GGUF brings its own."""
    chunk_bytes: int = CHUNK_BYTES
    chunks: tuple[Chunk, ...]
    tensors: tuple[Tensor, ...]
    side_files: tuple[SideFile, ...] = ()
    aliases: dict[str, str] = {}
    """Tied tensors: another name → the name of the tensor that holds its bytes."""

    def chunk_range(self, number: int) -> tuple[int, int]:
        """Offset and size of chunk `number`, in bytes."""
        offset = number * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.size_bytes - offset)


def encode_index(index: Index) -> bytes:
    """The `.idx` of an index: JSON with a fixed order of keys, a line a chunk and a tensor.

    Equal indexes give equal bytes, so equal checkpoints have equal ids.
    """
    lines = []
    for field in msgspec.structs.fields(Index):
        value = getattr(index, field.name)
        if value is None and field.name in _ABSENT_IF_NONE:
            continue
        if isinstance(value, dict):
            pairs = (_json(key) + ": " + _json(value[key]) for key in sorted(value))
            text = _block("{", pairs, "}")
        elif isinstance(value, tuple):
            text = _block("[", map(_json, value), "]")
        else:
            text = _json(value)
        lines.append(f'"{field.name}": {text}')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _block(opening: str, items: Iterable[str], closing: str) -> str:
    body = ",\n".join(items)
    return f"{opening}\n{body}\n{closing}" if body else opening + closing


def decode_index(data: bytes) -> Index:
    """Read an `.idx` from anybody.

    Raises:
        CheckpointError: it is not an index, is of a newer version, or says anything about the
            `.bin` that cannot be true; the message names the first thing that is wrong.
    """
    if len(data) > INDEX_BYTES_MAX:
        raise CheckpointError(f"index of {len(data)} bytes is longer than {INDEX_BYTES_MAX}")
    _check_version(data)
    index = parse_json(data, Index, "index")
    _check_head(index)
    _check_chunks(index)
    _check_parts(index)
    _check_aliases(index)
    return index


class _Head(msgspec.Struct):
    """What every version of an index has, so that a newer one is told from a broken one."""

    format: str = ""
    version: int = 0


def _check_version(data: bytes) -> None:
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (ValueError, RecursionError):
        raise CheckpointError("not an index: it is not JSON, or its version is no number") from None
    if head.format != FORMAT:
        raise CheckpointError(f"not an index: its format is not {FORMAT!r}")
    if head.version > VERSION:
        raise CheckpointError(
            f"index of version {head.version}, but this program reads up to {VERSION}: upgrade it"
        )
    if head.version < 1:
        raise CheckpointError("index: it has no version")


def _check_head(index: Index) -> None:
    for what in ("model", "source", "revision", "license", "architecture", "base"):
        text = getattr(index, what)
        if text is not None:
            check_text(text, f"index: {what}")
    if index.quantization is not None:
        check_text(index.quantization.scheme, "index: quantization scheme")
        check_text(index.quantization.library, "index: quantization library")
    if index.kind not in {KIND_TENSORS, KIND_GGUF}:
        raise CheckpointError(f"index: unknown kind {index.kind[:40]!r}")
    if not 0 < index.size_bytes <= BIN_BYTES_MAX:
        raise CheckpointError(f"index: a size of {index.size_bytes} bytes is out of range")
    alignment = index.alignment_bytes
    if not is_power_of_two(alignment) or alignment > ALIGNMENT_BYTES_MAX:
        raise CheckpointError(f"index: alignment {alignment} is not a power of two in range")
    if index.kind == KIND_TENSORS and alignment != TENSOR_ALIGNMENT_BYTES:
        raise CheckpointError(f"index: alignment {alignment} is not {TENSOR_ALIGNMENT_BYTES}")


def _check_chunks(index: Index) -> None:
    size = index.chunk_bytes
    if not is_power_of_two(size) or not CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX:
        raise CheckpointError(f"index: chunks of {size} bytes are not a power of two in range")
    needed = -(-index.size_bytes // size)
    if len(index.chunks) != needed:
        raise CheckpointError(f"index: {len(index.chunks)} chunks where {needed} are needed")
    for number, chunk in enumerate(index.chunks):
        if not _BLAKE3.fullmatch(chunk.blake3) or not 0 <= chunk.crc32c < 1 << 32:
            raise CheckpointError(f"index: a digest of chunk {number} is not a digest")


def _check_parts(index: Index) -> None:
    """Tensors, then side files: their names, their sizes, and that they share no byte."""
    check_count(len(index.tensors), "tensors")
    check_count(len(index.side_files), "side files", SIDE_FILES_MAX)
    if index.kind == KIND_GGUF and index.side_files:
        raise CheckpointError("index: a GGUF has no side files")
    for tensor in index.tensors:
        _check_tensor(tensor, index.kind)
    for side_file in index.side_files:
        if not is_side_file(side_file.name):
            raise CheckpointError(f"index: side file {side_file.name[:80]!r} is not allowed")
        if side_file.size_bytes > SIDE_FILE_BYTES_MAX:
            raise CheckpointError(f"index: side file {side_file.name!r} is too long")
    for parts in (index.tensors, index.side_files):
        if len({part.name for part in parts}) != len(parts):
            raise CheckpointError("index: a name occurs twice")
    spans = [(part.name, part.offset, part.size_bytes) for part in _parts(index)]
    check_spans(spans, index.size_bytes, index.alignment_bytes)


def _check_tensor(tensor: Tensor, kind: str) -> None:
    check_text(tensor.name, "index: tensor name")
    try:
        size = tensor_size_bytes(kind, tensor.dtype, tensor.shape)
    except CheckpointError as error:
        raise CheckpointError(f"index: tensor {tensor.name!r}: {error.message}") from None
    if size != tensor.size_bytes:
        raise CheckpointError(
            f"index: tensor {tensor.name!r} takes {size} bytes, not {tensor.size_bytes}"
        )


def _check_aliases(index: Index) -> None:
    names = {tensor.name for tensor in index.tensors}
    check_count(len(index.aliases), "aliases")
    for alias, name in index.aliases.items():
        check_text(alias, "index: alias")
        if alias in names or name not in names:
            raise CheckpointError(f"index: alias {alias!r} does not stand for one tensor")


def checkpoint_id(idx: bytes) -> CheckpointId:
    """The identity of a checkpoint: BLAKE3 of its `.idx` bytes, 64 hex digits."""
    return CheckpointId(blake3(idx).hexdigest())


def layers(index: Index) -> tuple[Layer, ...]:
    """The tensors grouped into layers, in execution order."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in sorted(index.tensors, key=lambda tensor: place(tensor.name)):
        groups.setdefault(place(tensor.name).name, []).append(tensor)
    return tuple(_layer(name, tensors) for name, tensors in groups.items())


def _layer(name: str, tensors: list[Tensor]) -> Layer:
    start = min(tensor.offset for tensor in tensors)
    end = max(tensor.offset + tensor.size_bytes for tensor in tensors)
    return Layer(name=name, offset=start, size_bytes=end - start, tensors=tuple(tensors))


def _parts(index: Index) -> tuple[Tensor | SideFile, ...]:
    return (*index.tensors, *index.side_files)


def tensor_at(index: Index, offset: int, size_bytes: int) -> str | None:
    """Name of the first tensor or side file with a byte in this range of the `.bin`."""
    return next(parts_at(index, offset, size_bytes), None)


def parts_at(index: Index, offset: int, size_bytes: int) -> Iterator[str]:
    """Names of the tensors and side files with a byte in this range of the `.bin`, in order."""
    parts = _parts(index)
    first = bisect_right(parts, offset, key=lambda part: part.offset) - 1
    for part in parts[max(first, 0) :]:
        if part.offset >= offset + size_bytes:
            return
        if part.size_bytes and offset < part.offset + part.size_bytes:
            yield part.name
