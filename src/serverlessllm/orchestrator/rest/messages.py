"""`/v1/messages`, Anthropic's API: asked as a chat, told as a message."""

from __future__ import annotations

import secrets

import msgspec

from serverlessllm.core.errors import SLLMError
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import Response
from serverlessllm.openai.chats import (
    CHAT_PATH,
    COUNT_PATH,
    Chat,
    ChatUsage,
    Choice,
    Failure,
    Loading,
    failure_of,
    read_count,
)
from serverlessllm.openai.errors import render_error
from serverlessllm.openai.messages.answer import Message, begun, whole
from serverlessllm.openai.messages.chat import to_chat, to_count, to_own_words
from serverlessllm.openai.messages.errors import error_body, error_frame
from serverlessllm.openai.messages.events import Assembly, Event
from serverlessllm.openai.messages.request import Create, parse_count, parse_create
from serverlessllm.openai.request import check_content_type
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.openai.sse import typed_events
from serverlessllm.orchestrator.rest.front import Front
from serverlessllm.orchestrator.rest.route import Route
from serverlessllm.orchestrator.rest.translating import (
    JSON,
    OK,
    asked,
    refusal,
    tell,
    translate,
    whole_answer,
)
from serverlessllm.orchestrator.settings import OrchestratorSettings

PATH = "/v1/messages"
_encoder = msgspec.json.Encoder()


class _Counted(msgspec.Struct, frozen=True):
    input_tokens: int


class _Story:
    """A chat's stream as a message's events."""

    def __init__(self, message: Message, create: Create, chat: Chat, request_id: str) -> None:
        self._assembly = Assembly(message, create.prompt.thinks)
        self._chat = chat
        self._request_id = request_id
        self._begun = False

    def wait(self, loading: Loading) -> bytes:
        return typed_events(self._assembly.wait(loading))

    def take(self, choice: Choice) -> bytes:
        return typed_events(self._begin() + self._assembly.take(choice))

    def end(self, usage: ChatUsage | None) -> bytes:
        return typed_events(self._begin() + self._assembly.end(usage))

    def fail(self, failure: Failure) -> bytes:
        return error_frame(to_own_words(failure, self._chat), self._request_id)

    def _begin(self) -> list[Event]:
        if self._begun:
            return []
        self._begun = True
        return self._assembly.begin()


class Messages:
    """The routes."""

    def __init__(
        self, settings: OrchestratorSettings, *, limits: RequestLimits, front: Front
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._front = front
        self.routes = (
            Route(path=PATH, methods=("POST",), serve=self._create, explain=explain),
            Route(
                path=f"{PATH}/count_tokens", methods=("POST",), serve=self._count, explain=explain
            ),
        )

    async def _create(self, request: Request) -> None:
        check_content_type(request.headers.get("content-type"))
        body = await request.body()
        create = await translate(len(body), parse_create, body, self._limits)
        chat = await translate(len(body), to_chat, create)
        message = begun(f"msg_{secrets.token_hex(16)}", create.prompt.model)
        async with asked(self._front, request, CHAT_PATH, chat.body) as response:
            if response.status != OK:
                await _refuse(request, response, chat)
            elif create.stream:
                story = _Story(message, create, chat, request.id)
                bytes_max = self._settings.translated_bytes_max
                await tell(request, response, story, bytes_max, (_own_id(request),))
            else:
                answer = await whole_answer(response, self._settings.translated_bytes_max)
                message = whole(message, answer.choices[0], answer.usage, create.prompt.thinks)
                request.respond(OK, (JSON, _own_id(request)), _encoder.encode(message))

    async def _count(self, request: Request) -> None:
        check_content_type(request.headers.get("content-type"))
        body = await request.body()
        prompt = await translate(len(body), parse_count, body, self._limits)
        chat = await translate(len(body), to_count, prompt)
        async with asked(self._front, request, COUNT_PATH, chat.body) as response:
            if response.status != OK:
                await _refuse(request, response, chat)
                return
            count = read_count(await response.read(self._settings.translated_bytes_max))
            request.respond(OK, (JSON, _own_id(request)), _encoder.encode(_Counted(count)))


def explain(request: Request, error: SLLMError) -> None:
    """Answer with an error in this API's shape."""
    status, headers, _ = render_error(error)
    body = error_body(failure_of(error), request.id)
    request.respond(status, [*headers, _own_id(request)], body)


async def _refuse(request: Request, response: Response, chat: Chat) -> None:
    failure, headers = await refusal(response)
    body = error_body(to_own_words(failure, chat), request.id)
    request.respond(failure.status, [*headers, _own_id(request)], body)


def _own_id(request: Request) -> tuple[str, str]:
    """The name that this API has for `x-request-id`."""
    return "request-id", request.id
