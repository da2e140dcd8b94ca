"""`/v1/responses` and `/v1/messages` as the document tells them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from serverlessllm.openai.document import Answer, Operation, Parameter
from serverlessllm.openai.document.dialects import (
    Counted,
    DeletedResponse,
    InputItems,
    MessageError,
    MessageRequest,
    PromptToCount,
    ResponseRequest,
)
from serverlessllm.openai.document.operation import EVENTS
from serverlessllm.openai.messages.answer import Message
from serverlessllm.openai.responses.answer import ResponseObject
from serverlessllm.orchestrator.rest.documents.inference import AGAIN, WAIT, asks

_RESPONSES = "Responses"
_MESSAGES = "Messages"
_KEPT = (400, 401, 403, 404, 405)
_TYPED = "With `stream`: server-sent events, each named by its `type`."
_ID = Parameter(name="response_id", where="path", type=str, description="Its id.")
_MESSAGE = '{"model":"org/name","max_tokens":64,"messages":[{"role":"user","content":"Hi"}]}'


def _kept(
    method: Literal["get", "delete"],
    path: str,
    summary: str,
    answer: type[msgspec.Struct],
    *parameters: Parameter,
) -> Operation:
    """What can be done with a response that is kept."""
    return Operation(
        path=path,
        method=method,
        tag=_RESPONSES,
        summary=summary,
        answers=(Answer(description="It is this.", type=answer),),
        parameters=(_ID, *parameters),
        errors=_KEPT,
    )


RESPONSES = (
    asks(
        _RESPONSES,
        "/v1/responses",
        "Make a response",
        ResponseRequest,
        Answer(description="The response.", type=ResponseObject),
        Answer(description=_TYPED, content_type=EVENTS),
        example='{"model":"org/name","input":"What is 2+2?"}',
        parameters=(WAIT, AGAIN),
    ),
    asks(
        _RESPONSES,
        "/v1/responses/input_tokens",
        "Count the tokens of a request",
        ResponseRequest,
        Answer(description="Their number.", type=Counted),
    ),
    _kept("get", "/v1/responses/{response_id}", "Show a response", ResponseObject),
    _kept("delete", "/v1/responses/{response_id}", "Delete a response", DeletedResponse),
    _kept(
        "get",
        "/v1/responses/{response_id}/input_items",
        "List what a response was asked",
        InputItems,
        Parameter(
            name="limit",
            where="query",
            type=Annotated[int, Meta(ge=1, le=100)],
            description="The most items of one page.",
        ),
        Parameter(
            name="order",
            where="query",
            type=Literal["asc", "desc"],
            description="Oldest or newest first.",
        ),
        Parameter(
            name="after",
            where="query",
            type=str,
            description="`last_id` of the page before.",
        ),
    ),
)
MESSAGES = (
    asks(
        _MESSAGES,
        "/v1/messages",
        "Make a message",
        MessageRequest,
        Answer(description="The message.", type=Message),
        Answer(description=_TYPED, content_type=EVENTS),
        example=_MESSAGE,
        parameters=(WAIT, AGAIN),
        error=MessageError,
    ),
    asks(
        _MESSAGES,
        "/v1/messages/count_tokens",
        "Count the tokens of a prompt",
        PromptToCount,
        Answer(description="Their number.", type=Counted),
        example='{"model":"org/name","messages":[{"role":"user","content":"Hi"}]}',
        error=MessageError,
    ),
)
