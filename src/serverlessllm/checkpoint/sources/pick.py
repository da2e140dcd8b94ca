"""Which files of a source are the model: decided from names alone, before any is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from serverlessllm.checkpoint.index import BIN_NAME, IDX_NAME
from serverlessllm.checkpoint.side_files import is_side_file
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint

SHARD_MAP = "model.safetensors.index.json"
TORCH_SHARD_MAP = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTERS = {"adapter_model.safetensors": "safetensors", "adapter_model.bin": "torch"}
SPLIT_GGUF = (
    "{} is a piece of a split GGUF: join the pieces with "
    "`llama-gguf-split --merge FIRST-PIECE OUT.gguf` and use OUT.gguf"
)

_SHARD = re.compile(r"(?P<stem>[A-Za-z0-9][\w.-]{0,200}?)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_NOT_A_MODEL = ("adapter_model", "mmproj", "optimizer", "scheduler")
_NOT_TORCH_WEIGHTS = re.compile(
    r"(?:.*[_.-])?(?:optim(?:izer)?|scheduler|scaler|training_args|trainer_state|rng_state|"
    r"random_states)(?:[_.-].*)?"
)
"""What trainers leave beside the weights."""


class Pick(msgspec.Struct, frozen=True, kw_only=True):
    """The files to convert: `weights` in one `format`, and what goes with them."""

    format: str
    """`safetensors`, `gguf`, `torch`, or `checkpoint` for one that is converted already."""
    weights: tuple[str, ...]
    shard_map: str | None = None
    """Says which tensor is in which of several `weights`."""
    side_files: tuple[str, ...] = ()
    adapter: bool = False
    """An adapter of another model, as PEFT saves it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that has to be fetched."""
        shard_map = (self.shard_map,) if self.shard_map else ()
        return (*shard_map, *self.side_files, *self.weights)


def pick(names: Iterable[str]) -> Pick:
    """Choose among the files at the top of a source: safetensors, a GGUF, an adapter, PyTorch's;
    before them a checkpoint, which is all of it already. Names that do not print are passed over.

    Raises:
        UnsupportedCheckpoint: a plain pickle, or a GGUF in pieces; says the way out.
        CheckpointError: no weights, or no way to tell which of several are meant.
    """
    present = sorted({name for name in names if name.isprintable()})
    if BIN_NAME in present and IDX_NAME in present:
        return Pick(format="checkpoint", weights=(BIN_NAME,), side_files=(IDX_NAME,))
    weights = [name for name in present if not name.startswith(_NOT_A_MODEL)]
    safetensors = [name for name in weights if name.endswith(".safetensors")]
    if safetensors:
        return _pick_safetensors(safetensors, present)
    ggufs = [name for name in weights if name.endswith(".gguf")]
    if ggufs:
        return _pick_gguf(ggufs)
    adapter = _pick_adapter(present)
    if adapter is not None:
        return adapter
    torch = [
        name
        for name in weights
        if name.endswith(_TORCH) and not _NOT_TORCH_WEIGHTS.fullmatch(name.rpartition(".")[0])
    ]
    if torch:
        return _pick_torch(torch, present)
    if any(name.endswith((".pkl", ".pickle")) for name in weights):
        raise UnsupportedCheckpoint(
            "only plain pickles are here, which are programs: use a revision of the model that "
            "has .safetensors files, or the weights as `torch.save` writes them"
        )
    raise CheckpointError(
        "no .safetensors, no .gguf and no PyTorch file (.bin, .pt, .pth) at the top of the source"
    )


def _pick_safetensors(files: list[str], present: list[str]) -> Pick:
    return _pick_tensors("safetensors", "model.safetensors", SHARD_MAP, files, present)


def _pick_torch(files: list[str], present: list[str]) -> Pick:
    return _pick_tensors("torch", "pytorch_model.bin", TORCH_SHARD_MAP, files, present)


def _pick_tensors(
    format_: str, usual: str, usual_map: str, files: list[str], present: list[str]
) -> Pick:
    """The file of the usual name, else what the map names, else a whole set, else the only one."""
    shard_map = None
    if usual in files:
        weights = [usual]
    elif usual_map in present:
        shard_map = usual_map
        weights = [name for name in files if _shard(name)]
        if not weights:
            raise CheckpointError(
                f"{usual_map} is here, but no shard: none of {_listed(files)} is called like "
                f"{usual.replace('.', '-00001-of-00002.')}"
            )
    elif len(files) == 1 and not _shard(files[0]):
        weights = files
    else:
        weights = files
        _check_all_shards(files, usual_map)
    return Pick(
        format=format_,
        weights=tuple(weights),
        shard_map=shard_map,
        side_files=tuple(filter(is_side_file, present)),
    )


def _pick_adapter(present: list[str]) -> Pick | None:
    """A folder of PEFT; None when a whole model lies there too, or it is none."""
    whole = any(name.startswith("pytorch_model") for name in present)
    weights = next((name for name in _ADAPTERS if name in present), None)
    if whole or weights is None or ADAPTER_CONFIG not in present:
        return None
    return Pick(
        format=_ADAPTERS[weights],
        weights=(weights,),
        side_files=tuple(filter(is_side_file, present)),
        adapter=True,
    )


def _pick_gguf(files: list[str]) -> Pick:
    shard = _shard(files[0])
    if shard and int(shard["count"]) > 1 and all(map(_shard, files)):
        raise UnsupportedCheckpoint(SPLIT_GGUF.format(files[0]))
    if len(files) > 1:
        raise CheckpointError(
            f"several GGUF files ({_listed(files)}): name one of them as the source"
        )
    return Pick(format="gguf", weights=(files[0],))


def _check_all_shards(files: list[str], shard_map: str) -> None:
    """Shards without a map are a model only if none is missing and none is of another set."""
    shards = [_shard(name) for name in files]
    sets = {(shard["stem"], int(shard["count"])) for shard in shards if shard}
    if not all(shards) or len(sets) != 1:
        raise CheckpointError(
            f"several files of weights ({_listed(files)}) and no {shard_map}: it has to say "
            "which tensors are in which"
        )
    count = sets.pop()[1]
    missing = set(range(1, count + 1)) - {int(shard["number"]) for shard in shards if shard}
    if missing:
        raise CheckpointError(f"shard {min(missing)} of {count} is missing")


def _shard(name: str) -> re.Match[str] | None:
    return _SHARD.fullmatch(name.rpartition(".")[0])


def _listed(files: list[str]) -> str:
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    return ", ".join(file[:100] for file in files[:8]) + more
