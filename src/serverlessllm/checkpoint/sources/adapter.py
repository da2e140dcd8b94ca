"""Adapters as PEFT saves them: a few tensors beside `adapter_config.json`, which names their base.

An adapter is a checkpoint of its own, of kind `tensors`; its index says which model it adapts.
"""

from __future__ import annotations

import re

import msgspec

from serverlessllm.checkpoint.bounds import check_text
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.side_files import CONFIG_BYTES_MAX
from serverlessllm.checkpoint.sources.base import RawCheckpoint, read_all
from serverlessllm.checkpoint.sources.pick import ADAPTER_CONFIG
from serverlessllm.core.errors import CheckpointError, InvalidModelName
from serverlessllm.core.ids import model_name, parse_model_id

_SEPARATORS = re.compile(r"[/\\]+")
_CACHED = re.compile(r"models--([\w.-]+)", re.ASCII)
"""A folder of Hugging Face's cache: a snapshot in it has a revision for its name."""


class _AdapterConfig(msgspec.Struct, frozen=True):
    base_model_name_or_path: str | None = None


def adapter_layout(raw: RawCheckpoint, weights: Layout) -> Layout:
    """The layout of an adapter, given that of its tensors and side files.

    Without an architecture: nobody shall take it for a model that runs alone.

    Raises:
        CheckpointError: its configuration is not valid, or names no base.
    """
    data = read_all(raw.files[ADAPTER_CONFIG], CONFIG_BYTES_MAX)
    try:
        config = msgspec.json.decode(data, type=_AdapterConfig)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{ADAPTER_CONFIG}: not the configuration of an adapter") from None
    return msgspec.structs.replace(
        weights, base=base_name(config.base_model_name_or_path or ""), architecture=None
    )


def base_name(text: str) -> str:
    """The model that `base_model_name_or_path` means, without its revision.

    A name of a hub is taken as it is. Of anything else, a path of the machine that trained it, only
    the last component is, or the model of that machine's cache: it is no place on this one.

    Raises:
        CheckpointError: neither is the name of a model.
    """
    check_text(text, f"{ADAPTER_CONFIG}: base_model_name_or_path")
    parts = [part for part in _SEPARATORS.split(text) if part]
    cached = [found[1].replace("--", "/", 1) for found in map(_CACHED.fullmatch, parts) if found]
    names = (text, *cached[-1:], *parts[-1:]) if "://" not in text else ()
    for name in names:
        try:
            return model_name(parse_model_id(name))
        except InvalidModelName:
            continue
    raise CheckpointError(
        f"{ADAPTER_CONFIG}: base_model_name_or_path {text[:80]!r} is not the name of a model: "
        "write the base's name there, such as org/name"
    )
