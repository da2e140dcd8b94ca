"""safetensors: a header of our own reading, and the tensors it promises.

The file is `u64 header size | JSON header | bytes`; the header maps each tensor's name to its
dtype, shape and byte range. Tensors must fill the bytes without gap or overlap, as the format's
own library demands.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from serverlessllm.checkpoint.bounds import check_count, check_text
from serverlessllm.checkpoint.dtypes import tensor_size_bytes
from serverlessllm.checkpoint.index import KIND_TENSORS
from serverlessllm.checkpoint.layout import Layout, RawTensor
from serverlessllm.checkpoint.sources.base import RawCheckpoint, RawFile, read_at
from serverlessllm.checkpoint.sources.pick import Pick
from serverlessllm.checkpoint.sources.shards import lay_out_shards
from serverlessllm.checkpoint.strict_json import check_values, decode_json, parse_json
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.units import MIB

HEADER_BYTES_MAX = 64 * MIB
_METADATA = "__metadata__"


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """One file's tensors, in the order of their bytes, and its free metadata."""

    tensors: tuple[RawTensor, ...]
    metadata: dict[str, str]


def read_header(file: RawFile) -> Header:
    """Read and check the header of one file.

    Raises:
        CheckpointError: it lies, about anything.
    """
    if file.size_bytes < 8:
        raise CheckpointError(f"{file.name}: too short for a safetensors file")
    size = int.from_bytes(read_at(file, 0, 8), "little")
    if size > min(HEADER_BYTES_MAX, file.size_bytes - 8):
        raise CheckpointError(f"{file.name}: a header of {size} bytes does not fit")
    data = read_at(file, 8, size)
    check_values(data, file.name)
    raw = parse_json(data, dict[str, msgspec.Raw], file.name)
    metadata = raw.pop(_METADATA, None)
    check_count(len(raw), f"tensors in {file.name}")
    tensors = [_tensor(file, name, bytes(entry), 8 + size) for name, entry in raw.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes, tensor.name))
    _check_filled(file, tensors, 8 + size)
    return Header(
        tensors=tuple(tensors),
        metadata=decode_json(bytes(metadata), dict[str, str], file.name) if metadata else {},
    )


def _tensor(file: RawFile, name: str, data: bytes, start: int) -> RawTensor:
    check_text(name, f"{file.name}: tensor name")
    entry = decode_json(data, _Entry, f"{file.name}: tensor {name!r}")
    begin, end = entry.data_offsets
    try:
        size = tensor_size_bytes(KIND_TENSORS, entry.dtype, entry.shape)
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: tensor {name!r}: {error.message}") from None
    if begin < 0 or end - begin != size:
        raise CheckpointError(
            f"{file.name}: tensor {name!r} takes {size} bytes, but its range is {begin}-{end}"
        )
    return RawTensor(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        file=file,
        offset=start + begin,
        size_bytes=size,
    )


def _check_filled(file: RawFile, tensors: Iterable[RawTensor], start: int) -> None:
    """Each tensor begins where the one before ends, or is the one before under another name."""
    begin, end = start, start
    for tensor in tensors:
        tied = tensor.offset == begin and tensor.offset + tensor.size_bytes == end
        if tensor.offset != end and not tied:
            raise CheckpointError(
                f"{file.name}: tensor {tensor.name!r} overlaps another, or leaves a gap before it"
            )
        begin, end = tensor.offset, tensor.offset + tensor.size_bytes
    if end != file.size_bytes:
        raise CheckpointError(
            f"{file.name}: its tensors end at byte {end}, but it has {file.size_bytes}"
        )


def safetensors_layout(raw: RawCheckpoint, chosen: Pick) -> Layout:
    """Plan the `.bin` of a source that is one or several safetensors files.

    Raises:
        CheckpointError: a header, the shard map or a side file is not valid.
    """
    removed: dict[str, str] = {}

    def read(file: RawFile) -> Iterable[RawTensor]:
        header = read_header(file)
        # `safetensors.torch.save_model` leaves tied tensors out, and notes them like this.
        removed.update(header.metadata)
        return header.tensors

    return lay_out_shards(raw, chosen, read, removed)
