"""Read what the system must know of a request; the backend gets the original bytes."""

from __future__ import annotations

import functools
import re
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Raw

from serverlessllm.core.errors import (
    InvalidJSON,
    InvalidRequest,
    UnsupportedMediaType,
)
from serverlessllm.core.ids import ModelId, parse_model_id
from serverlessllm.core.units import parse_duration_s
from serverlessllm.openai.nesting import check_nesting
from serverlessllm.openai.settings import RequestLimits

_path = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_missing = re.compile(r"Object missing required field `(?P<field>[^`]*)`")

Temperature = Annotated[float, Meta(ge=0, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0)]


class ParsedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What routing needs of a request."""

    model: ModelId
    stream: bool = False
    keep_alive_s: float | None = None
    """This request's own; -1 for ever; None: the model's."""
    answer_tokens_max: int | None = None
    """The most tokens that the answer may have, all of its choices together, where it says so."""


class _Fields(msgspec.Struct, kw_only=True):
    """What every request may say; fields that are not here pass through unread."""

    model: str
    keep_alive: str | int | float | None = None


class _Sampled(_Fields, kw_only=True):
    """What chats and completions share."""

    stream: bool | None = None
    n: int | None = None
    max_tokens: Count | None = None
    stop: str | list[str] | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None


class _MediaURL(msgspec.Struct):
    url: str = ""


class _Part(msgspec.Struct):
    """A piece of a message's content."""

    type: str
    image_url: _MediaURL | str | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None


class _Chat(_Sampled, kw_only=True):
    messages: list[_Message]
    max_completion_tokens: Count | None = None
    top_logprobs: Count | None = None
    logprobs: bool | None = None
    tools: list[Raw] | None = None


class _Completion(_Sampled, kw_only=True):
    prompt: Raw
    best_of: int | None = None
    logprobs: Count | None = None


class _Embeddings(_Fields, kw_only=True):
    input: Raw


_T = TypeVar("_T", bound=_Fields)

_chat = msgspec.json.Decoder(_Chat)
_completion = msgspec.json.Decoder(_Completion)
_embeddings = msgspec.json.Decoder(_Embeddings)
_texts = msgspec.json.Decoder(list[str])
_items = msgspec.json.Decoder(list[Raw])

_model = functools.lru_cache(maxsize=1024)(parse_model_id)
"""Clients name few models, again and again; what is refused is not remembered."""


def check_content_type(content_type: str | None) -> None:
    """Raise `UnsupportedMediaType` unless it is JSON (or not said at all)."""
    if content_type is None or content_type == "application/json":
        return
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise UnsupportedMediaType(
            "the body must be JSON: send it with the header 'content-type: application/json'"
        )


def parse_chat(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """`POST /v1/chat/completions`.

    Raises:
        InvalidJSON: not UTF-8, not JSON, nested too deep, or not an object.
        InvalidRequest: a field is missing, of a wrong type or out of range; `param` names it.
        InvalidModelName: the model's name cannot be one.
    """
    chat = _decode(_chat, body, limits)
    if not chat.messages:
        raise InvalidRequest("messages: at least one message is needed", param="messages")
    _at_most("messages", len(chat.messages), limits.messages_max, "messages")
    for message in chat.messages:
        if message.content.__class__ is list:
            _check_media(chat.messages)
            break
    _check_sampled(chat, limits)
    if chat.max_completion_tokens is not None:
        _at_most("max_completion_tokens", chat.max_completion_tokens, limits.max_tokens_max)
    if chat.top_logprobs is not None:
        _at_most("top_logprobs", chat.top_logprobs, limits.top_logprobs_max)
    if chat.tools is not None:
        _at_most("tools", len(chat.tools), limits.tools_max, "tools")
    return _parsed(chat, stream=bool(chat.stream))


def parse_completion(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """`POST /v1/completions`; raises as `parse_chat`."""
    completion = _decode(_completion, body, limits)
    _check_texts("prompt", completion.prompt, limits)
    _check_sampled(completion, limits)
    if completion.best_of is not None:
        _check_answers("best_of", completion.best_of, limits)
    if completion.logprobs is not None:
        _at_most("logprobs", completion.logprobs, limits.top_logprobs_max)
    return _parsed(completion, stream=bool(completion.stream))


def parse_embeddings(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """`POST /v1/embeddings`; raises as `parse_chat`."""
    embeddings = _decode(_embeddings, body, limits)
    _check_texts("input", embeddings.input, limits)
    return _parsed(embeddings, stream=False)


def _decode(decoder: msgspec.json.Decoder[_T], body: bytes, limits: RequestLimits) -> _T:
    check_nesting(body, limits)
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise InvalidJSON(f"the body is not UTF-8 (byte {error.start})") from error
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error
    except msgspec.DecodeError as error:
        raise InvalidJSON(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidJSON("the body is nested too deep") from error


def _explain(text: str) -> InvalidRequest | InvalidJSON:
    """msgspec's sentence and path as our error."""
    match = _path.match(text)
    what, path = (text, None) if match is None else match.group("what", "path")
    param = (path or "").removeprefix(".")
    missing = _missing.match(what)
    if missing is not None:
        param = f"{param}.{missing['field']}" if param else missing["field"]
        return InvalidRequest(f"{param}: this field is required", param=param)
    if not param:
        return InvalidJSON("the body must be a JSON object")
    return InvalidRequest(f"{param}: {what[:1].lower()}{what[1:]}", param=param)


def _parsed(fields: _Fields, *, stream: bool) -> ParsedRequest:
    keep_alive_s = None
    if fields.keep_alive is not None:
        try:
            keep_alive_s = parse_duration_s(fields.keep_alive)
        except ValueError as error:
            raise InvalidRequest(f"keep_alive: {error}", param="keep_alive") from error
    return ParsedRequest(model=_model(fields.model), stream=stream, keep_alive_s=keep_alive_s)


def _check_sampled(fields: _Sampled, limits: RequestLimits) -> None:
    if fields.n is not None:
        _check_answers("n", fields.n, limits)
    if fields.max_tokens is not None:
        _at_most("max_tokens", fields.max_tokens, limits.max_tokens_max)
    stop = fields.stop
    if stop is None:
        return
    stops = [stop] if isinstance(stop, str) else stop
    _at_most("stop", len(stops), limits.stop_max, "sequences")
    for text in stops:
        _at_most("stop", len(text), limits.stop_chars_max, "characters")


def _check_answers(param: str, count: int, limits: RequestLimits) -> None:
    if not 1 <= count <= limits.n_max:
        raise InvalidRequest(f"{param}: must be from 1 to {limits.n_max}", param=param)


def _at_most(param: str, count: int, most: int, unit: str = "") -> None:
    if count > most:
        raise InvalidRequest(f"{param}: at most {most} {unit}".rstrip(), param=param)


def _check_media(messages: list[_Message]) -> None:
    """A URL in a message would make the backend fetch what a stranger names."""
    for place, message in enumerate(messages):
        if not isinstance(message.content, list):
            continue
        for index, part in enumerate(message.content):
            media = part.image_url
            url = media.url if isinstance(media, _MediaURL) else media
            if url and not url.startswith("data:"):
                param = f"messages[{place}].content[{index}].image_url"
                raise InvalidRequest(f"{param}: send media inline, as a data: URL", param=param)


def _check_texts(param: str, value: Raw, limits: RequestLimits) -> None:
    """A text, several, or (arrays of) token ids; the backend judges the ids."""
    text = bytes(memoryview(value)[:64]).lstrip()
    if text.startswith(b'"'):
        return
    if not text.startswith(b"["):
        raise InvalidRequest(f"{param}: expected a string or an array", param=param)
    first = text[1:].lstrip()[:1]
    if first == b"]":
        raise InvalidRequest(f"{param}: must not be empty", param=param)
    if first in {b'"', b"["}:
        try:
            count = len((_texts if first == b'"' else _items).decode(value))
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{param}: expected strings only", param=param) from error
        _at_most(param, count, limits.inputs_max, "items")
    elif not first.isdigit() and first:
        raise InvalidRequest(f"{param}: expected strings or token ids", param=param)
