"""Bodies of `/v1/models` and `/v1/models/{id}`."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from serverlessllm.core.ids import ModelId, model_name


class ModelObject(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the OpenAI API shows it."""

    id: ModelId
    object: str = "model"
    created: int = 0
    """Unix time."""
    owned_by: str = "serverlessllm"


class _ModelList(msgspec.Struct, frozen=True):
    object: str
    data: tuple[ModelObject, ...]


_encoder = msgspec.json.Encoder()


def model_object(model: ModelId, created_s: int) -> ModelObject:
    """The object of one model; its organisation owns it, if its name has one."""
    owner, slash, _ = model_name(model).partition("/")
    return ModelObject(id=model, created=created_s, owned_by=owner if slash else "serverlessllm")


def model_body(model: ModelObject) -> bytes:
    """The body of `GET /v1/models/{id}`."""
    return _encoder.encode(model)


def list_body(models: Iterable[ModelObject]) -> bytes:
    """The body of `GET /v1/models`."""
    return _encoder.encode(_ModelList("list", tuple(models)))
