"""What is known about a model: the operator's spec and the checkpoint it became."""

from __future__ import annotations

import msgspec

from serverlessllm.core.ids import CheckpointId, ModelId

SCHEMA_VERSION = 1
"""Of every record in the metadata store; a reader refuses a newer one clearly."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the operator asked for.

    `source` is a URL of raw weights (`hf://org/name`, `file:///path`, `s3://…`) or None for a
    model that needs no checkpoint of ours (the `fake` backend, a URL that speaks OpenAI).
    `command` and `url` configure the `openai` backend; `options` any backend (strings, checked
    by the backend).
    """

    model: ModelId
    source: str | None = None
    backend: str | None = None
    """None: the first installed backend that can serve it."""
    keep_alive_s: float | None = None
    """Idle time before an instance unloads; -1 never; None: the agent's default."""
    min_replicas: int = 0
    max_replicas: int = 8
    pinned: bool = False
    """Its bytes are never evicted from DRAM or NVMe."""
    aliases: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    url: str | None = None
    options: dict[str, str] = {}


class CheckpointRef(msgspec.Struct, frozen=True, kw_only=True):
    """Where a published checkpoint lies in the store, and what it must be."""

    id: CheckpointId
    prefix: str
    """`<model>/<revision>`: the folder of `model.bin` and `model.idx` in the store."""
    size_bytes: int
    """Of `model.bin`."""
    base: str | None = None
    """Of an adapter: the model it adapts."""


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`models/<model>` in the metadata store."""

    schema_version: int = SCHEMA_VERSION
    spec: ModelSpec
    checkpoint: CheckpointRef | None = None
    """None until an ingest has published it."""
    created_s: int = 0
    """Unix time, shown as `created` in `/v1/models`."""
