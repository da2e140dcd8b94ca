"""From a body to what routing needs of it: each kind of request is checked here."""

from __future__ import annotations

from typing import Final

import msgspec

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request.chat import ChatRequest
from serverlessllm.openai.request.checks import (
    at_least,
    at_most,
    check_sampled,
    items_at_most,
    parsed,
)
from serverlessllm.openai.request.completion import CompletionRequest
from serverlessllm.openai.request.embeddings import EmbeddingsRequest
from serverlessllm.openai.request.errors import MissingParameter
from serverlessllm.openai.request.fields import ParsedRequest
from serverlessllm.openai.request.messages import AssistantMessage, check_assistant
from serverlessllm.openai.request.prompts import check_texts
from serverlessllm.openai.request.read import read_request
from serverlessllm.openai.request.tools import (
    Named,
    SchemaAnswer,
    check_functions,
    check_named,
    check_needs_tools,
    check_schema,
    check_tool_choice,
    check_tools,
)
from serverlessllm.openai.settings import RequestLimits

_chats: Final = msgspec.json.Decoder(ChatRequest)
_completions: Final = msgspec.json.Decoder(CompletionRequest)
_embeddings: Final = msgspec.json.Decoder(EmbeddingsRequest)


def parse_chat(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check a chat.

    Raises:
        InvalidJSON: not UTF-8, not JSON, nested too deep, or not an object.
        InvalidRequest: a field is missing, of a wrong type or out of range; `param` names it.
        InvalidModelName: the model's name cannot be one.
    """
    chat = read_request(_chats, body, limits)
    messages = chat.messages
    if len(messages) > limits.messages_max:
        items_at_most("messages", len(messages), limits.messages_max, "messages")
    for place, message in enumerate(messages):
        if message.__class__ is AssistantMessage:
            check_assistant(place, message)
    check_sampled(chat, limits)
    if chat.tools is not None:
        check_tools(chat.tools, limits)
    _check_rare(chat, limits)
    tokens_max = chat.max_completion_tokens
    if tokens_max is not None:
        at_most("max_completion_tokens", tokens_max, limits.max_tokens_max)
    if chat.max_tokens is not None:
        at_most("max_tokens", chat.max_tokens, limits.max_tokens_max)
        tokens_max = tokens_max or chat.max_tokens
    if tokens_max is not None:
        tokens_max *= chat.n or 1
    return parsed(chat, stream=chat.stream is True, answer_tokens_max=tokens_max)


def _check_rare(chat: ChatRequest, limits: RequestLimits) -> None:
    """What few requests say, and what it needs beside it."""
    if chat.tool_choice is not None:
        check_tool_choice(chat.tool_choice, chat.tools)
    if chat.parallel_tool_calls is not None:
        check_needs_tools("parallel_tool_calls", chat.tools)
    if chat.top_logprobs:
        at_most("top_logprobs", chat.top_logprobs, limits.top_logprobs_max)
        if not chat.logprobs:
            raise InvalidRequest(
                "top_logprobs: only together with logprobs=true", param="top_logprobs"
            )
    form = chat.response_format
    if form.__class__ is SchemaAnswer and form.json_schema.schema is not None:
        check_schema("response_format.json_schema.schema", form.json_schema.schema, limits)
    if chat.modalities is not None and "audio" in chat.modalities and chat.audio is None:
        raise MissingParameter("audio: needed by modalities", param="audio")
    if chat.functions is not None:
        check_functions(chat.functions, limits)
    if isinstance(chat.function_call, Named):
        names = (function.name for function in chat.functions or ())
        check_named("function_call.name", chat.function_call.name, names)


def parse_completion(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check a completion; raises as `parse_chat`."""
    completion = read_request(_completions, body, limits)
    prompts = check_texts("prompt", completion.prompt, limits)
    check_sampled(completion, limits)
    answers = completion.n or 1
    if completion.best_of is not None:
        answers = _check_best_of(completion, completion.best_of, limits)
    if completion.logprobs is not None:
        at_most("logprobs", completion.logprobs, limits.top_logprobs_max)
    tokens_max = completion.max_tokens
    if tokens_max is not None:
        at_most("max_tokens", tokens_max, limits.max_tokens_max)
        if not tokens_max and not completion.echo:
            at_least("max_tokens", tokens_max, 1, ", or 0 together with echo=true")
        tokens_max *= answers * prompts
    return parsed(completion, stream=completion.stream is True, answer_tokens_max=tokens_max)


def _check_best_of(completion: CompletionRequest, best_of: int, limits: RequestLimits) -> int:
    at_most("best_of", best_of, limits.n_max)
    at_least("best_of", best_of, completion.n or 1, " (it is n)")
    if best_of > 1 and completion.stream:
        raise InvalidRequest("best_of: only 1 together with stream=true", param="best_of")
    return best_of


def parse_embeddings(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check an embeddings request; raises as `parse_chat`."""
    embeddings = read_request(_embeddings, body, limits)
    check_texts("input", embeddings.input, limits, empty=False)
    if embeddings.dimensions is not None:
        at_most("dimensions", embeddings.dimensions, limits.dimensions_max)
    return parsed(embeddings)
