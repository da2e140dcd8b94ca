"""What the checks of several requests share: fields beside each other, limits that are settings."""

from __future__ import annotations

import functools
from typing import Final

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.core.ids import parse_model_id
from serverlessllm.core.units import parse_duration_s
from serverlessllm.openai.request.errors import (
    AboveMaximum,
    ArrayTooLong,
    BelowMinimum,
    InvalidValue,
    ObjectTooLarge,
    TextTooLong,
)
from serverlessllm.openai.request.fields import ParsedRequest, RequestFields, SampledFields
from serverlessllm.openai.settings import RequestLimits

_model: Final = functools.lru_cache(maxsize=1024)(parse_model_id)
"""Clients name few models, again and again; what is refused is not remembered."""


def parsed(
    fields: RequestFields, *, stream: bool = False, answer_tokens_max: int | None = None
) -> ParsedRequest:
    """What routing needs of it.

    Raises:
        InvalidModelName, InvalidRequest: `model` or `keep_alive` cannot be one.
    """
    keep_alive_s = None
    if fields.keep_alive is not None:
        try:
            keep_alive_s = parse_duration_s(fields.keep_alive)
        except ValueError as error:
            raise InvalidValue(f"keep_alive: {error}", param="keep_alive") from error
    return ParsedRequest(
        model=_model(fields.model),
        stream=stream,
        keep_alive_s=keep_alive_s,
        answer_tokens_max=answer_tokens_max,
    )


def check_sampled(fields: SampledFields, limits: RequestLimits) -> None:
    """Raise `InvalidRequest` for what one of these fields may not say beside another."""
    if fields.n is not None:
        at_most("n", fields.n, limits.n_max)
    if fields.stop is not None:
        _check_stop(fields.stop, limits)
    if fields.stream_options is not None and not fields.stream:
        raise InvalidRequest(
            "stream_options: only together with stream=true", param="stream_options"
        )
    if fields.logit_bias is not None and len(fields.logit_bias) > limits.logit_bias_max:
        raise ObjectTooLarge(
            f"logit_bias: at most {limits.logit_bias_max} tokens", param="logit_bias"
        )


def _check_stop(stop: str | list[str], limits: RequestLimits) -> None:
    stops = [stop] if isinstance(stop, str) else stop
    items_at_most("stop", len(stops), limits.stop_max, "sequences")
    for text in stops:
        if len(text) > limits.stop_chars_max:
            raise TextTooLong(f"stop: at most {limits.stop_chars_max} characters", param="stop")


def at_most(param: str, value: int, most: int) -> None:
    """Raise unless `value` is `most` at most."""
    if value > most:
        raise AboveMaximum(f"{param}: at most {most}", param=param)


def at_least(param: str, value: int, least: int, why: str) -> None:
    """Raise unless `value` is `least` at least."""
    if value < least:
        raise BelowMinimum(f"{param}: at least {least}{why}", param=param)


def items_at_most(param: str, count: int, most: int, what: str) -> None:
    """Raise unless an array has `most` items at most."""
    if count > most:
        raise ArrayTooLong(f"{param}: at most {most} {what}", param=param)
