"""The response object: as it begins, and as it ends."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

from serverlessllm.openai.chats import ChatUsage, Failure
from serverlessllm.openai.errors import ErrorFields
from serverlessllm.openai.responses.items import OutputItem
from serverlessllm.openai.responses.request import Create, Metadata, ReasoningConfig
from serverlessllm.openai.responses.tools import FunctionTool, TextConfig, ToolChoice

ResponseStatus = Literal["completed", "failed", "in_progress", "incomplete"]
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer is not whole, by the chat's reason to finish."""


class InputDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Struct, frozen=True, kw_only=True):
    reasoning_tokens: int


class Usage(Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Struct, frozen=True, kw_only=True):
    reason: str


class ResponseError(Struct, frozen=True, kw_only=True):
    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str


class ResponseObject(Struct, frozen=True, kw_only=True):
    """Every key is always there, as the API has it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Unix time."""
    status: ResponseStatus = "in_progress"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: tuple[OutputItem, ...] = ()
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningConfig
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float | None
    """None: the model's own."""
    text: TextConfig
    tool_choice: ToolChoice
    tools: tuple[FunctionTool, ...]
    top_logprobs: int
    top_p: float | None
    """None: the model's own."""
    truncation: Literal["disabled"] = "disabled"
    usage: Usage | None = None
    user: str | None
    metadata: Metadata


def begun(create: Create, response_id: str, created_s: int) -> ResponseObject:
    """The response before the model has said anything."""
    return ResponseObject(
        id=response_id,
        created_at=created_s,
        instructions=create.instructions,
        max_output_tokens=create.max_output_tokens,
        max_tool_calls=create.max_tool_calls,
        model=create.model,
        parallel_tool_calls=create.parallel_tool_calls is not False,
        previous_response_id=create.previous_response_id,
        prompt_cache_key=create.prompt_cache_key,
        reasoning=create.reasoning,
        safety_identifier=create.safety_identifier,
        store=create.store,
        temperature=create.temperature,
        text=create.text,
        tool_choice=create.tool_choice,
        tools=create.tools,
        top_logprobs=create.top_logprobs,
        top_p=create.top_p,
        user=create.user,
        metadata=create.metadata,
    )


def ended(
    response: ResponseObject,
    output: tuple[OutputItem, ...],
    finish_reason: str,
    usage: ChatUsage | None,
    now_s: int,
) -> ResponseObject:
    """The response with all that the model said; incomplete when it was stopped."""
    why = _INCOMPLETE.get(finish_reason)
    return msgspec.structs.replace(
        response,
        status="incomplete" if why else "completed",
        incomplete_details=IncompleteDetails(reason=why) if why else None,
        completed_at=None if why else now_s,
        output=output,
        usage=_usage(usage or ChatUsage()),
    )


def failed(
    response: ResponseObject, output: tuple[OutputItem, ...], failure: Failure
) -> ResponseObject:
    """The response that broke off."""
    error = ResponseError(code=_code(failure.error), message=failure.error.message)
    return msgspec.structs.replace(response, status="failed", error=error, output=output)


def is_cut(finish_reason: str) -> bool:
    """Whether the model was stopped in the middle."""
    return finish_reason in _INCOMPLETE


def _code(error: ErrorFields) -> Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]:
    if error.code in {"rate_limit_exceeded", "queue_full"}:
        return "rate_limit_exceeded"
    return "invalid_prompt" if error.type == "invalid_request_error" else "server_error"


def _usage(usage: ChatUsage) -> Usage:
    return Usage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )
