"""What is fuzzed: every parser that reads what strangers wrote, and what must hold of its answer.

A target takes any bytes. It may refuse them by a `CheckpointError`; whatever it accepts must be
true of the bytes. Anything else that leaves it is a finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from unittest.mock import patch

from serverlessllm.checkpoint.bounds import CHUNK_BYTES_MAX
from serverlessllm.checkpoint.convert import plan_layout
from serverlessllm.checkpoint.dtypes import SAFETENSORS_BITS
from serverlessllm.checkpoint.index import Chunk, decode_index, encode_index, layers, tensor_at
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.pickles.archive import check_local, read_directory
from serverlessllm.checkpoint.pickles.interpreter import read_state_dict
from serverlessllm.checkpoint.pickles.sandbox import decode_answer
from serverlessllm.checkpoint.pickles.values import TensorView
from serverlessllm.checkpoint.sources import torch_zip
from serverlessllm.checkpoint.sources.base import MemoryFile, RawCheckpoint
from serverlessllm.checkpoint.sources.pick import ADAPTER_CONFIG, SHARD_MAP, pick
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.ids import parse_model_id
from serverlessllm.testing import torch_files

Target = Callable[[bytes], None]

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_HEADERS = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b'{"b":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
)
_STORAGES = {"0": bytes(range(16)), "1": bytes(range(100, 196))}
_LOOK_BYTES = 4096
_MESSAGE_CHARS_MAX = 2000
_CHUNK = Chunk(blake3="0" * 64, crc32c=0)


def index(data: bytes) -> None:
    """An `.idx`: what is accepted is written again as the same index."""
    try:
        decoded = decode_index(data)
    except CheckpointError as error:
        _check_refusal(error)
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
    _plan({"model.gguf": data})


def adapter_config(data: bytes) -> None:
    """The configuration of an adapter whose tensors are good: the base is the name of a model."""
    tensors = _safetensors(_HEADERS[0], bytes(8))
    layout = _plan({ADAPTER_CONFIG: data, "adapter_model.safetensors": tensors})
    if layout is not None:
        assert layout.base is not None
        assert parse_model_id(layout.base).isprintable()


def names(data: bytes) -> None:
    """The names of a source's files, one a line: those that are chosen are among them."""
    present = data.decode(errors="surrogateescape").split("\n")
    try:
        chosen = pick(present)
    except CheckpointError as error:
        _check_refusal(error)
        return
    assert chosen.weights
    assert set(chosen.names) <= set(present)
    assert len(set(chosen.names)) == len(chosen.names)
    assert all(name.isprintable() for name in chosen.names)


def pickle(data: bytes) -> None:
    """The pickle inside of a PyTorch file: what is understood is plain values."""
    try:
        state = read_state_dict(data)
    except CheckpointError as error:
        _check_refusal(error)
        return
    for view in state.tensors:
        _check_view(view)


def pickle_answer(data: bytes) -> None:
    """What the process says that reads a pickle, if a pickle has taken it over."""
    try:
        state = decode_answer(data)
    except CheckpointError as error:
        _check_refusal(error)
        return
    for view in state.tensors:
        _check_view(view)


def torch_file(data: bytes) -> None:
    """A PyTorch file with this pickle and two storages: its tensors are what it says they are."""
    with patch.object(torch_zip, "read_state_dict_apart", read_state_dict):
        layout = _plan({"pytorch_model.bin": torch_files.torch_zip(data, _STORAGES)})
    if layout is None or layout.size_bytes > _LOOK_BYTES:
        return
    written = bytearray(layout.size_bytes)
    layout.read_into(0, memoryview(written))
    placed = {tensor.name: tensor for tensor in layout.tensors}
    for view in read_state_dict(data).tensors:
        tensor = placed[layout.aliases.get(view.name, view.name)]
        assert written[tensor.offset : tensor.offset + tensor.size_bytes] == _row_major(view)


def _row_major(view: TensorView) -> bytes:
    stored, item = _STORAGES[view.storage], SAFETENSORS_BITS[view.dtype] // 8
    if 0 in view.shape:
        return b""
    starts = (
        item * (view.offset + sum(map(int.__mul__, index, view.strides)))
        for index in product(*map(range, view.shape))
    )
    return b"".join(stored[start : start + item] for start in starts)


def _check_view(view: TensorView) -> None:
    assert {type(view.name), type(view.dtype), type(view.storage)} == {str}
    assert view.name.isprintable()
    assert view.dtype in SAFETENSORS_BITS
    numbers = (view.storage_bytes, view.offset, *view.shape, *view.strides)
    assert all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def zip_directory(data: bytes) -> None:
    """A PyTorch file's zip: its entries lie apart and inside of it."""
    file = MemoryFile("pytorch_model.bin", data)
    try:
        entries = sorted(read_directory(file).entries.values(), key=lambda entry: entry.start)
        for entry in entries:
            check_local(file, entry)
    except CheckpointError as error:
        _check_refusal(error)
        return
    _check_disjoint(
        ((entry.start, entry.offset + entry.size_bytes - entry.start) for entry in entries),
        len(data),
    )


def _safetensors(header: bytes, tensors: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + tensors


def _plan(files: Mapping[str, bytes]) -> Layout | None:
    """What is accepted reads nothing outside of its files, writes nothing twice, and can be told.

    None: it was refused.
    """
    raw = RawCheckpoint(
        files={name: MemoryFile(name, data) for name, data in files.items()},
        model="fuzz",
        source="file:fuzz",
        revision="local",
    )
    try:
        layout = plan_layout(raw)
    except CheckpointError as error:
        _check_refusal(error)
        return None
    for segment in layout.segments:
        assert segment.source_offset >= 0
        assert segment.source_offset + segment.size_bytes <= segment.file.size_bytes
    _check_disjoint(
        ((segment.offset, segment.size_bytes) for segment in layout.segments), layout.size_bytes
    )
    _check_disjoint(
        ((tensor.offset, tensor.size_bytes) for tensor in layout.tensors), layout.size_bytes
    )
    chunks = [_CHUNK] * math.ceil(layout.size_bytes / CHUNK_BYTES_MAX)
    index = layout.index(raw, chunks, CHUNK_BYTES_MAX)
    assert decode_index(encode_index(index)) == index
    return layout


def _check_refusal(error: CheckpointError) -> None:
    """A client, a log and a terminal can take it."""
    assert error.message.isprintable(), ascii(error.message)
    assert len(error.message) <= _MESSAGE_CHARS_MAX


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
    "adapter_config": adapter_config,
    "names": names,
    "gguf": gguf,
    "pickle": pickle,
    "pickle_answer": pickle_answer,
    "torch_file": torch_file,
    "zip_directory": zip_directory,
}
