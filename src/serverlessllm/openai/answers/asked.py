"""What a client asked for, as far as it decides the form of the answer."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import UNSET, Raw, UnsetType

from serverlessllm.core.errors import InvalidJSON, InvalidRequest


class Kind(StrEnum):
    """Which of the API's answers; the value is its route."""

    CHAT = "/v1/chat/completions"
    TEXT = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"


KINDS = {kind.value: kind for kind in Kind}
"""By route."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The form that the answer must have."""

    kind: Kind
    model: str
    """The name that the client used: the answer echoes it."""
    stream: bool = False
    include_usage: bool = False
    """Whether a stream ends with a chunk of token counts."""
    logprobs: bool = False
    base64: bool = False
    """Whether an embedding is the base64 of little-endian float32."""
    dimensions: int | None = None
    """Length of an embedding."""
    keep_alive: bool = False
    """Whether the body has that field, which is ours and no engine's."""


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct):
    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | UnsetType | None = UNSET
    logprobs: bool | int | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    keep_alive: Raw | UnsetType = UNSET


_body = msgspec.json.Decoder(_Body)
_fields = msgspec.json.Decoder(dict[str, Raw])
_encoder = msgspec.json.Encoder()
_ASK_FOR_USAGE = b'"stream_options":{"include_usage":true}}'


def read_asked(kind: Kind, body: bytes) -> Asked:
    """Read it from a request's body, which the front door has checked.

    Raises:
        InvalidJSON, InvalidRequest: it was not checked.
    """
    try:
        read = _body.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request is not valid: {error}") from None
    except (msgspec.DecodeError, RecursionError):
        raise InvalidJSON("the body is not JSON") from None
    options = read.stream_options
    return Asked(
        kind=kind,
        model=read.model,
        stream=bool(read.stream) and kind is not Kind.EMBEDDINGS,
        include_usage=bool(options and options.include_usage),
        # A chat says true; a completion says how many alternatives, of which 0 is a number too.
        logprobs=(
            bool(read.logprobs)
            if kind is Kind.CHAT
            else read.logprobs is not None and read.logprobs is not False
        ),
        base64=read.encoding_format == "base64",
        dimensions=read.dimensions,
        keep_alive=read.keep_alive is not UNSET,
    )


def engine_body(asked: Asked, body: bytes, model: str, *, streams_usage: bool) -> bytes:
    """The request as the engine gets it: `model` is the name that the engine knows, fields of our
    own are left out, and of a stream the token counts are asked for where `streams_usage`.

    Most bodies pass as they are, or with a few bytes spliced to their end.
    """
    ask_for_usage = streams_usage and asked.stream and not asked.include_usage
    if asked.model == model and not asked.keep_alive:
        if not ask_for_usage:
            return body
        if b'"stream_options"' not in body and b"\\" not in body:
            # An escape could spell the name, too.
            return body.rstrip()[:-1] + b"," + _ASK_FOR_USAGE
    fields = _fields.decode(body)
    fields.pop("keep_alive", None)
    fields["model"] = Raw(_encoder.encode(model))
    if ask_for_usage:
        fields["stream_options"] = Raw(b'{"include_usage":true}')
    return _encoder.encode(fields)
