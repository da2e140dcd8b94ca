"""Reading the bodies of the management API: typed, bounded, errors that name the field."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, field

from serverlessllm.core.errors import InvalidJSON, InvalidRequest, RequestTooLarge
from serverlessllm.core.ids import ModelId, parse_model_id
from serverlessllm.core.models import ModelSpec
from serverlessllm.core.units import FOREVER_S, MIB, parse_duration_s
from serverlessllm.openai.request.fields import MODEL_FORM, SECONDS_FORM, ModelName

Body = TypeVar("Body", bound=msgspec.Struct)

BODY_BYTES_MAX = MIB
REPLICAS_MAX = 1024
ALIASES_MAX = 64
OPTIONS_MAX = 64
TEXT_CHARS_MAX = 4096
SOURCE_SCHEMES = ("hf", "file", "s3", "az", "gs")
Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]
SOURCE_FORM = Meta(extra_json_schema={"pattern": f"^(?:{'|'.join(SOURCE_SCHEMES)})://."})
"""Told, not checked: `check_source` does that, with a message of its own."""
_LIMIT_DIGITS_MAX = 9
_WHERE = re.compile(r"(.*) - at `\$\.?(.*)`", re.DOTALL)


class NewModel(
    ModelSpec, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A spec as an operator sends it: a misspelt field is an error, not a default."""

    model: Annotated[ModelId, MODEL_FORM]
    source: Annotated[str, SOURCE_FORM] | None = None
    url: Annotated[str, Meta(extra_json_schema={"pattern": "^https?://"})] | None = None
    keep_alive_s: Annotated[float, SECONDS_FORM] | None = None
    min_replicas: Annotated[int, Meta(ge=0, le=REPLICAS_MAX)] = 0
    max_replicas: Annotated[int, Meta(ge=1, le=REPLICAS_MAX)] = 8
    aliases: Annotated[tuple[ModelName, ...], Meta(max_length=ALIASES_MAX)] = ()
    options: Annotated[dict[str, Text], Meta(max_length=OPTIONS_MAX)] = field(default_factory=dict)


def read_body(data: bytes, kind: type[Body]) -> Body:
    """A body of type `kind`.

    Raises:
        RequestTooLarge: longer than `BODY_BYTES_MAX`.
        InvalidJSON: not JSON, or nested too deep.
        InvalidRequest: a field is missing, unknown or of a wrong type; `param` names it.
    """
    if len(data) > BODY_BYTES_MAX:
        raise RequestTooLarge(f"the body is longer than {BODY_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        found = _WHERE.fullmatch(str(error))
        if found is None:
            raise InvalidRequest(str(error)) from error
        raise InvalidRequest(f"{found[2]}: {found[1]}", param=found[2]) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJSON("the body is not JSON that can be read") from error


def read_spec(data: bytes) -> ModelSpec:
    """A `ModelSpec` that may be registered.

    Raises:
        InvalidRequest, InvalidModelName: what may not be, and why.
    """
    spec = ModelSpec(**msgspec.structs.asdict(read_body(data, NewModel)))
    check_spec(spec)
    return spec


def check_spec(spec: ModelSpec) -> None:
    """Raise for a value out of range."""
    for name in (spec.model, *spec.aliases):
        parse_model_id(name)
    if len(spec.aliases) > ALIASES_MAX:
        raise InvalidRequest(f"aliases: at most {ALIASES_MAX}", param="aliases")
    if not 0 <= spec.min_replicas <= spec.max_replicas:
        raise InvalidRequest("min_replicas: from 0 to max_replicas", param="min_replicas")
    if not 1 <= spec.max_replicas <= REPLICAS_MAX:
        raise InvalidRequest(f"max_replicas: from 1 to {REPLICAS_MAX}", param="max_replicas")
    if spec.keep_alive_s is not None and not (
        spec.keep_alive_s == FOREVER_S or 0 <= spec.keep_alive_s < float("inf")
    ):
        raise InvalidRequest("keep_alive_s: seconds, or -1 for ever", param="keep_alive_s")
    if spec.source is not None:
        check_source(spec.source)
    if spec.url is not None and not spec.url.startswith(("http://", "https://")):
        raise InvalidRequest("url: http:// or https://", param="url")
    if len(spec.options) > OPTIONS_MAX:
        raise InvalidRequest(f"options: at most {OPTIONS_MAX}", param="options")
    texts = (spec.source or "", spec.url or "", *spec.command, *spec.options.values())
    if any(len(text) > TEXT_CHARS_MAX for text in texts):
        raise InvalidRequest(f"a text is longer than {TEXT_CHARS_MAX} characters")


def check_source(source: str) -> None:
    """Raise unless it is a URL that ingestion knows the scheme of."""
    scheme, separator, rest = source.partition("://")
    if not separator or scheme not in SOURCE_SCHEMES or not rest:
        known = ", ".join(f"{scheme}://" for scheme in SOURCE_SCHEMES)
        raise InvalidRequest(f"source {source[:200]!r}: write a URL of {known}", param="source")


def read_keep_alive_s(value: float | str | None) -> float | None:
    """Seconds; raises `InvalidRequest` for what is not a duration."""
    if value is None:
        return None
    try:
        return parse_duration_s(value)
    except ValueError as error:
        raise InvalidRequest(str(error), param="keep_alive") from error


def read_limit(text: str | None, largest: int) -> int:
    """The `limit` of a listing."""
    if text is None:
        return largest
    limit = int(text) if text.isdecimal() and len(text) <= _LIMIT_DIGITS_MAX else 0
    if not 1 <= limit <= largest:
        raise InvalidRequest(f"limit: a number from 1 to {largest}", param="limit")
    return limit


def model_of(name: str, names: dict[str, ModelId]) -> ModelId:
    """The canonical name of a registered model, else the checked name itself."""
    return names.get(name) or parse_model_id(name)
