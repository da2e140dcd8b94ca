"""`POST /v1/tokenize`, `/v1/detokenize`: a text or a chat as the model reads it (vLLM's form)."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request.checks import items_at_most, parsed
from serverlessllm.openai.request.errors import MissingParameter
from serverlessllm.openai.request.fields import ParsedRequest, RequestFields, TokenId
from serverlessllm.openai.request.messages import Message
from serverlessllm.openai.request.read import read_request
from serverlessllm.openai.request.tools import Tool
from serverlessllm.openai.settings import RequestLimits


class TokenizeRequest(RequestFields, frozen=True, kw_only=True):
    """A text, or a chat, whose tokens are wanted: one of `prompt` and `messages`."""

    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Begin with those that the tokenizer begins each text with; null: yes for a text, and as the
    template has it for a chat."""
    add_generation_prompt: bool = True
    """Of a chat: end where the answer begins."""
    continue_final_message: bool = False
    """Of a chat: the last message is the beginning of the answer."""
    tools: list[Tool] | None = None
    """Of a chat."""
    return_token_strs: bool | None = None
    """Tell each token's text too."""


class DetokenizeRequest(RequestFields, frozen=True, kw_only=True):
    """Tokens whose text is wanted."""

    tokens: list[TokenId]


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    count: int
    max_model_len: int
    """Tokens of the longest prompt and answer together."""
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    prompt: str


_tokenize = msgspec.json.Decoder(TokenizeRequest)
_detokenize = msgspec.json.Decoder(DetokenizeRequest)


def parse_tokenize(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check a tokenize request; raises as `parse_chat`."""
    asked = read_request(_tokenize, body, limits)
    check_tokenize(asked)
    if asked.messages is not None:
        items_at_most("messages", len(asked.messages), limits.messages_max, "messages")
    if asked.tools is not None:
        items_at_most("tools", len(asked.tools), limits.tools_max, "tools")
    return parsed(asked)


def parse_detokenize(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check a detokenize request; raises as `parse_chat`."""
    asked = read_request(_detokenize, body, limits)
    items_at_most("tokens", len(asked.tokens), limits.token_ids_max, "token ids")
    return parsed(asked)


def check_tokenize(asked: TokenizeRequest) -> None:
    """Raise unless there is one of a text and a chat."""
    if asked.prompt is None and asked.messages is None:
        raise MissingParameter("prompt: this field, or messages, is required", param="prompt")
    if asked.prompt is not None and asked.messages is not None:
        raise InvalidRequest("prompt: not together with messages", param="prompt")
    if asked.add_generation_prompt and asked.continue_final_message:
        raise InvalidRequest(
            "continue_final_message: only with add_generation_prompt=false",
            param="continue_final_message",
        )
