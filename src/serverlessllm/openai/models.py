"""Bodies of `/v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from serverlessllm.core.ids import ModelId, model_name
from serverlessllm.openai.errors import ErrorFields


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How ready a model is; not in the OpenAI API."""

    state: Literal["ready", "loading", "ingesting", "cold", "failed"]
    stage: str = ""
    """Of what is on its way: what it does now, such as `nvme→dram`."""
    bytes: int = 0
    """Of the stage: moved so far."""
    total: int | None = None
    """None: nothing moves, or it is not known."""
    eta_s: float | UnsetType = UNSET
    """Absent rather than guessed."""
    agents_ready: int = 0
    """Agents that answer for it now."""
    cache_level: str = ""
    """The nearest tier that holds its bytes: `device`, `dram`, `nvme`, `store`; empty: none."""
    error: ErrorFields | UnsetType = UNSET
    """Why it failed, moments ago."""


class ModelObject(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the OpenAI API shows it."""

    id: str
    """What the client calls it: an alias, where it asked by one."""
    root: ModelId
    """The model's own name."""
    object: str = "model"
    created: int = 0
    """Unix time."""
    owned_by: str = "serverlessllm"
    status: ModelStatus | UnsetType = UNSET


class _ModelList(msgspec.Struct, frozen=True):
    object: str
    data: tuple[ModelObject, ...]


_encoder = msgspec.json.Encoder()


def model_object(
    model: ModelId,
    created_s: int,
    status: ModelStatus | UnsetType = UNSET,
    *,
    name: str | None = None,
) -> ModelObject:
    """The object of one model, asked for by `name`, else by its own; its organisation owns it, if
    its own name has one."""
    owner, slash, _ = model_name(model).partition("/")
    return ModelObject(
        id=name or model,
        root=model,
        created=created_s,
        owned_by=owner if slash else "serverlessllm",
        status=status,
    )


def model_body(model: ModelObject) -> bytes:
    """The body of `GET /v1/models/{id}`."""
    return _encoder.encode(model)


def list_body(models: Iterable[ModelObject]) -> bytes:
    """The body of `GET /v1/models`."""
    return _encoder.encode(_ModelList("list", tuple(models)))
