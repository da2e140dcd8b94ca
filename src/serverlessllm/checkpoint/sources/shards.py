"""Tensors of one or several files as one model: shards put together, ties undone, laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from serverlessllm.checkpoint.bounds import check_count, check_text
from serverlessllm.checkpoint.layout import Layout, RawTensor, arrange
from serverlessllm.checkpoint.order import place
from serverlessllm.checkpoint.side_files import collect_side_files
from serverlessllm.checkpoint.sources.base import RawCheckpoint, RawFile, read_all, read_at
from serverlessllm.checkpoint.sources.pick import Pick
from serverlessllm.checkpoint.strict_json import check_values, parse_json
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.units import MIB

SHARD_MAP_BYTES_MAX = 64 * MIB
_PROBE_BYTES = 4096
_COMPARE_BYTES = 1 * MIB
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class _ShardMap(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def lay_out_shards(
    raw: RawCheckpoint,
    chosen: Pick,
    read: Callable[[RawFile], Iterable[RawTensor]],
    removed: Mapping[str, str],
) -> Layout:
    """Plan the `.bin` of a source that is one or several files of tensors.

    `read` gives the tensors of one file. `removed`, looked at afterwards, maps names that a writer
    left out to those that hold their bytes.

    Raises:
        CheckpointError: the shards or a side file are not valid, or what `read` raises.
    """
    tensors = _collect(raw, chosen, read)
    side_files, config = collect_side_files(raw)
    kept, aliases = _untie(tensors.values())
    for name, target in removed.items():
        if name not in tensors and target in kept:
            check_text(name, "name of a tensor that was left out")
            aliases[name] = target
    if config.tied_embeddings and _HEAD not in tensors and _EMBEDDING in kept:
        aliases.setdefault(_HEAD, _EMBEDDING)
    check_count(len(aliases), "names of tensors that were left out")
    if config.architecture is not None:
        check_text(config.architecture, "config.json: architecture")
    if not any(tensor.size_bytes for tensor in kept.values()):
        raise CheckpointError("all tensors of the source are empty")
    return arrange(kept.values(), side_files, aliases=aliases, architecture=config.architecture)


def _collect(
    raw: RawCheckpoint, chosen: Pick, read: Callable[[RawFile], Iterable[RawTensor]]
) -> dict[str, RawTensor]:
    shards = _shards(raw, chosen)
    tensors: dict[str, RawTensor] = {}
    for name in sorted(set(shards.values())) or chosen.weights:
        for tensor in read(raw.files[name]):
            if shards.get(tensor.name, name) != name:
                continue  # the map says that another file's copy counts
            if tensor.name in tensors:
                raise CheckpointError(f"tensor {tensor.name!r} is in two files")
            tensors[tensor.name] = tensor
        check_count(len(tensors), "tensors")
    missing = shards.keys() - tensors.keys()
    if missing:
        raise CheckpointError(f"{chosen.shard_map}: no file has tensor {min(missing)[:80]!r}")
    if not tensors:
        raise CheckpointError("the source has no tensors")
    return tensors


def _shards(raw: RawCheckpoint, chosen: Pick) -> Mapping[str, str]:
    """Name of the file of each tensor; empty where no map says so."""
    if chosen.shard_map is None:
        return {}
    data = read_all(raw.files[chosen.shard_map], SHARD_MAP_BYTES_MAX)
    check_values(data, chosen.shard_map)
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
