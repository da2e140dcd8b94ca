"""safetensors: a header of our own reading, and the tensors it promises.

The file is `u64 header size | JSON header | bytes`; the header maps each tensor's name to its
dtype, shape and byte range. Tensors must fill the bytes without gap or overlap, as the format's
own library demands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from serverlessllm.checkpoint.bounds import check_count, check_text
from serverlessllm.checkpoint.dtypes import tensor_size_bytes
from serverlessllm.checkpoint.index import KIND_TENSORS
from serverlessllm.checkpoint.layout import Layout, RawTensor, arrange
from serverlessllm.checkpoint.order import place
from serverlessllm.checkpoint.side_files import collect_side_files
from serverlessllm.checkpoint.sources.base import RawCheckpoint, RawFile, read_all, read_at
from serverlessllm.checkpoint.sources.pick import Pick
from serverlessllm.checkpoint.strict_json import decode_json, parse_json
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.units import MIB

HEADER_BYTES_MAX = 64 * MIB
_PROBE_BYTES = 4096
_COMPARE_BYTES = 1 * MIB
_METADATA = "__metadata__"
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _ShardMap(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


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
    shards = _shards(raw, chosen)
    tensors: dict[str, RawTensor] = {}
    removed: dict[str, str] = {}
    for name in sorted(set(shards.values())) or chosen.weights:
        header = read_header(raw.files[name])
        removed |= header.metadata
        for tensor in header.tensors:
            if shards.get(tensor.name, name) != name:
                continue  # the map says that another file's copy counts
            if tensor.name in tensors:
                raise CheckpointError(f"tensor {tensor.name!r} is in two files")
            tensors[tensor.name] = tensor
    missing = shards.keys() - tensors.keys()
    if missing:
        raise CheckpointError(f"{chosen.shard_map}: no file has tensor {min(missing)!r}")
    check_count(len(tensors), "tensors")
    if not tensors:
        raise CheckpointError("the source has no tensors")
    side_files, config = collect_side_files(raw)
    kept, aliases = _untie(tensors.values())
    for name, target in removed.items():
        # `safetensors.torch.save_model` leaves tied tensors out, and notes them like this.
        if name not in tensors and target in kept:
            aliases[name] = target
    if config.tied_embeddings and _HEAD not in tensors and _EMBEDDING in kept:
        aliases.setdefault(_HEAD, _EMBEDDING)
    return arrange(kept.values(), side_files, aliases=aliases, architecture=config.architecture)


def _shards(raw: RawCheckpoint, chosen: Pick) -> Mapping[str, str]:
    """Name of the file of each tensor; empty where no map says so."""
    if chosen.shard_map is None:
        return {}
    data = read_all(raw.files[chosen.shard_map], HEADER_BYTES_MAX)
    shards = parse_json(data, _ShardMap, chosen.shard_map).weight_map
    allowed = set(chosen.weights)
    for tensor, name in shards.items():
        if name not in allowed:
            raise CheckpointError(
                f"{chosen.shard_map}: tensor {tensor[:80]!r} is in {name[:80]!r}, which is not "
                "a shard of this source"
            )
    return shards


def _untie(tensors: Iterable[RawTensor]) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Keep one of the tensors that share their bytes; the others become aliases of it."""
    kept: dict[tuple[object, ...], RawTensor] = {}
    aliases: dict[str, str] = {}
    for tensor in sorted(tensors, key=lambda tensor: (place(tensor.name), tensor.name)):
        # An empty tensor has no bytes to share.
        where = (tensor.file.name, tensor.offset, tensor.size_bytes or tensor.name)
        first = kept.setdefault(where, tensor)
        if first is tensor:
            continue
        if (first.dtype, first.shape) != (tensor.dtype, tensor.shape):
            raise CheckpointError(
                f"tensors {first.name!r} and {tensor.name!r} read the same bytes differently"
            )
        aliases[tensor.name] = first.name
    by_name = {tensor.name: tensor for tensor in kept.values()}
    _untie_head(by_name, aliases)
    return by_name, aliases


def _untie_head(kept: dict[str, RawTensor], aliases: dict[str, str]) -> None:
    """The one tie that many writers store twice: a head that is the embedding, byte for byte."""
    head, embedding = kept.get(_HEAD), kept.get(_EMBEDDING)
    if (
        head is None
        or embedding is None
        or (head.dtype, head.shape) != (embedding.dtype, embedding.shape)
    ):
        return
    start, size = 0, _PROBE_BYTES  # most heads differ in their first bytes
    while start < head.size_bytes:
        size = min(size, head.size_bytes - start)
        if read_at(head.file, head.offset + start, size) != read_at(
            embedding.file, embedding.offset + start, size
        ):
            return
        start, size = start + size, _COMPARE_BYTES
    del kept[_HEAD]
    for alias in [alias for alias, name in aliases.items() if name == _HEAD]:
        aliases[alias] = _EMBEDDING
    aliases[_HEAD] = _EMBEDDING
