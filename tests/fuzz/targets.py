"""What is fuzzed: every parser that reads what strangers wrote, and what must hold of its answer.

A target takes any bytes. It may refuse them by a `CheckpointError`; whatever it accepts must be
true of the bytes. Anything else that leaves it is a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from serverlessllm.checkpoint.index import decode_index, encode_index, layers, tensor_at
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.pickles.archive import check_local, read_directory
from serverlessllm.checkpoint.pickles.interpreter import read_state_dict
from serverlessllm.checkpoint.sources.base import MemoryFile, RawCheckpoint, RawFile
from serverlessllm.checkpoint.sources.gguf import gguf_layout
from serverlessllm.checkpoint.sources.pick import SHARD_MAP, pick
from serverlessllm.checkpoint.sources.safetensors import safetensors_layout
from serverlessllm.core.errors import CheckpointError

Target = Callable[[bytes], None]

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_HEADERS = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b'{"b":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
)


def index(data: bytes) -> None:
    """An `.idx`: what is accepted is written again as the same index."""
    try:
        decoded = decode_index(data)
    except CheckpointError:
        return
    assert decode_index(encode_index(decoded)) == decoded
    spread = layers(decoded)
    assert sum(len(layer.tensors) for layer in spread) == len(decoded.tensors)
    for number in range(min(len(decoded.chunks), 4)):
        tensor_at(decoded, *decoded.chunk_range(number))


def safetensors(data: bytes) -> None:
    """A whole `.safetensors` file."""
    _plan({"model.safetensors": data})


def safetensors_header(data: bytes) -> None:
    """Only the JSON: the length before it and the bytes after it are right."""
    _plan({"model.safetensors": _safetensors(data, bytes(64))})


def shard_map(data: bytes) -> None:
    """The map of a sharded source whose shards are good."""
    shards = {
        name: _safetensors(header, bytes(8)) for name, header in zip(_SHARDS, _HEADERS, strict=True)
    }
    _plan({SHARD_MAP: data, **shards})


def gguf(data: bytes) -> None:
    """A whole GGUF."""
    _check_layout(lambda files: gguf_layout(files["model.gguf"]), {"model.gguf": data})


def pickle(data: bytes) -> None:
    """The pickle inside of a PyTorch file: what is understood is plain values."""
    try:
        state = read_state_dict(data)
    except CheckpointError:
        return
    for view in state.tensors:
        assert {type(view.name), type(view.dtype), type(view.storage)} == {str}
        assert {type(number) for number in (view.offset, *view.shape, *view.strides)} == {int}
        assert len(view.shape) == len(view.strides)


def zip_directory(data: bytes) -> None:
    """A PyTorch file's zip: its entries lie apart and inside of it."""
    file = MemoryFile("pytorch_model.bin", data)
    try:
        entries = sorted(read_directory(file).entries.values(), key=lambda entry: entry.start)
        for entry in entries:
            check_local(file, entry)
    except CheckpointError:
        return
    _check_disjoint(
        ((entry.start, entry.offset + entry.size_bytes - entry.start) for entry in entries),
        len(data),
    )


def _safetensors(header: bytes, tensors: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + tensors


def _plan(files: Mapping[str, bytes]) -> None:
    def lay(raw: Mapping[str, RawFile]) -> Layout:
        checkpoint = RawCheckpoint(files=raw, model="fuzz", source="file:fuzz", revision="local")
        return safetensors_layout(checkpoint, pick(raw))

    _check_layout(lay, files)


def _check_layout(
    lay: Callable[[Mapping[str, RawFile]], Layout], files: Mapping[str, bytes]
) -> None:
    """What is accepted reads nothing outside of its files and writes nothing twice."""
    raw = {name: MemoryFile(name, data) for name, data in files.items()}
    try:
        layout = lay(raw)
    except CheckpointError:
        return
    for segment in layout.segments:
        assert segment.source_offset >= 0
        assert segment.source_offset + segment.size_bytes <= segment.file.size_bytes
    _check_disjoint(
        ((segment.offset, segment.size_bytes) for segment in layout.segments), layout.size_bytes
    )
    _check_disjoint(
        ((tensor.offset, tensor.size_bytes) for tensor in layout.tensors), layout.size_bytes
    )


def _check_disjoint(spans: Iterable[tuple[int, int]], size_bytes: int) -> None:
    end = 0
    for offset, size in spans:
        assert end <= offset
        end = offset + size
    assert end <= size_bytes


TARGETS: dict[str, Target] = {
    "index": index,
    "safetensors": safetensors,
    "safetensors_header": safetensors_header,
    "shard_map": shard_map,
    "gguf": gguf,
    "pickle": pickle,
    "zip_directory": zip_directory,
}
