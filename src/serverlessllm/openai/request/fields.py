"""What requests share: the fields of every one, and those of sampled text."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from serverlessllm.core.ids import ModelId
from serverlessllm.openai.request.patterns import DURATION, ID_AS_KEY, MODEL

Temperature: TypeAlias = Annotated[float, Meta(ge=0, le=2)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Count: TypeAlias = Annotated[int, Meta(ge=0)]
AtLeastOne: TypeAlias = Annotated[int, Meta(ge=1)]
Int64: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Bias: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]
Stop: TypeAlias = Annotated[str, Meta(min_length=1)]
Identifier: TypeAlias = Annotated[str, Meta(max_length=512)]
MODEL_FORM = Meta(extra_json_schema={"pattern": MODEL})
"""Told, not checked: `parse_model_id` does that, with an error of its own."""
ModelName: TypeAlias = Annotated[str, MODEL_FORM]
SECONDS_FORM = Meta(extra_json_schema={"anyOf": [{"minimum": 0}, {"const": -1}]})
"""Told, not checked: `parse_duration_s` does that."""
KeepAlive: TypeAlias = (
    Annotated[str, Meta(max_length=64, extra_json_schema={"pattern": DURATION})]
    | Annotated[float, SECONDS_FORM]
)
Biases: TypeAlias = Annotated[
    dict[TokenId, Bias], Meta(extra_json_schema={"propertyNames": {"pattern": ID_AS_KEY}})
]


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What routing needs of a request."""

    model: ModelId
    stream: bool = False
    keep_alive_s: float | None = None
    """This request's own; -1 for ever; None: the model's."""
    answer_tokens_max: int | None = None
    """The most tokens that the answer may have, all of its choices together, where it says so."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream is told; only together with `stream`."""

    include_usage: bool | None = None
    """End the stream with a chunk that counts the tokens."""
    include_obfuscation: bool | None = None
    """Accepted, and without effect here."""


class RequestFields(msgspec.Struct, frozen=True, kw_only=True):
    """What every request may say; fields that are not named here pass through to the backend."""

    model: ModelName
    """A registered model's name or alias, or one that can be ingested on demand:
    `[org/]name[@revision]`."""
    keep_alive: KeepAlive | None = None
    """How long the model stays ready after this request: seconds, a duration such as `5m`, 0 to
    unload at once, -1 for ever. Null: as the model's owner set it."""
    user: Identifier | None = None
    """A stable name of your end user."""


class SampledFields(RequestFields, frozen=True, kw_only=True):
    """What chats and completions share."""

    stream: bool | None = None
    """Answer with server-sent events, a chunk as soon as it is there."""
    stream_options: StreamOptions | None = None
    """How the stream is told; only together with `stream`."""
    n: AtLeastOne | None = None
    """Answers to the same prompt."""
    stop: Stop | list[Stop] | None = None
    """Texts at which the answer ends; they are not part of it."""
    temperature: Temperature | None = None
    """0 always takes the likeliest token; higher is more random."""
    top_p: Share | None = None
    """Sample only from the likeliest tokens that have this much probability together."""
    presence_penalty: Penalty | None = None
    """Above 0: tokens that occurred at all become less likely."""
    frequency_penalty: Penalty | None = None
    """Above 0: tokens become less likely the more often they occurred."""
    logit_bias: Biases | None = None
    """Added to the logits of these token ids before sampling."""
    seed: Int64 | None = None
    """Equal requests with equal seeds give equal answers, as far as the backend can."""
