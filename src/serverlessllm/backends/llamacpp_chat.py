"""Chats that llama.cpp's server does not answer as the API has it.

Where an answer is made to be a call, and where its own constraints fail (see `gbnf`), the chat is
rendered by its template and completed as a text; calls are found in that text by us.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from serverlessllm.backends.calls import Calls, Delta, delta_fields, message_fields
from serverlessllm.backends.dialect import Engine, decode
from serverlessllm.backends.gbnf import grammar
from serverlessllm.backends.llamacpp_wire import (
    COMPLETIONS,
    Choice,
    Token,
    Usage,
    another,
    read_event,
    render,
    spells,
    usage_fields,
)
from serverlessllm.backends.tools import ToolFields, calls_schema, toolset_of
from serverlessllm.core.errors import InvalidRequest
from serverlessllm.core.failures import single_error
from serverlessllm.openai.request.tools import JSONAnswer, ResponseFormat, SchemaAnswer

CHATS = "/v1/chat/completions"
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call")
_OF_A_CHAT = ("messages", "response_format", "logprobs", "top_logprobs", "stream_options")
_encoder = msgspec.json.Encoder()
_fields = msgspec.json.Decoder(dict[str, Raw])


_Said = Raw | UnsetType


class _Message(msgspec.Struct, frozen=True, gc=False):
    """What a message may hold beside its role."""

    content: str | list[Raw] | None = None
    tool_calls: _Said = UNSET
    refusal: _Said = UNSET
    name: _Said = UNSET
    function_call: _Said = UNSET
    audio: _Said = UNSET

    @property
    def plain(self) -> bool:
        return (
            self.content.__class__ is str
            and self.tool_calls is UNSET
            and self.refusal is UNSET
            and self.name is UNSET
            and self.function_call is UNSET
            and self.audio is UNSET
        )


class _Glance(msgspec.Struct, frozen=True, gc=False):
    """What a chat may hold that the engine does not do as the API has it."""

    messages: list[_Message]
    tools: _Said = UNSET
    tool_choice: _Said = UNSET
    functions: _Said = UNSET
    function_call: _Said = UNSET
    response_format: _Said = UNSET
    logprobs: _Said = UNSET
    top_logprobs: _Said = UNSET
    n: _Said = UNSET
    modalities: _Said = UNSET
    web_search_options: _Said = UNSET
    continue_final_message: _Said = UNSET


_PLAIN = (UNSET,) * (len(_Glance.__struct_fields__) - 1)


def as_it_stands(body: bytes) -> bool:
    """Whether the engine answers a checked chat as the API has it. Asked of every chat: 2 µs."""
    if b"null" in body:
        return False
    messages, *special = msgspec.structs.astuple(decode(body, _Glance))
    if tuple(special) != _PLAIN:
        return False
    return all(message.plain for message in messages)


class ChatAsk(ToolFields, frozen=True, kw_only=True):
    """What decides how a chat is put to the engine."""

    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None
    n: int | None = None
    seed: int | None = None
    continue_final_message: bool | None = None

    @property
    def scores_only(self) -> bool:
        """Whether log probabilities are wanted without alternatives."""
        return bool(self.logprobs) and not self.top_logprobs

    @property
    def schema(self) -> dict[str, Any] | None:
        """Of the answer; None: it may be any text."""
        if isinstance(self.response_format, SchemaAnswer):
            schema = self.response_format.json_schema.schema
            plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema or {}))
            return plain
        return {"type": "object"} if isinstance(self.response_format, JSONAnswer) else None


def without_tools(body: bytes) -> bytes:
    """A chat that is not to call any."""
    fields = _fields.decode(body)
    for field in _TOOLS:
        fields.pop(field, None)
    return _encoder.encode(fields)


class _Part(msgspec.Struct, frozen=True):
    type: str


class _Parts(msgspec.Struct, frozen=True):
    content: str | list[_Part] | None = None


class _Messages(msgspec.Struct, frozen=True):
    messages: list[_Parts]


def check_text_only(body: bytes) -> None:
    """Raise `InvalidRequest` for a message that is more than text: a checkpoint is one GGUF, and
    what sees or hears is in another one."""
    for place, message in enumerate(decode(body, _Messages).messages):
        if not isinstance(message.content, list):
            continue
        for number, part in enumerate(message.content):
            if part.type not in {"text", "refusal"}:
                param = f"messages[{place}].content[{number}]"
                raise InvalidRequest(f"{param}: this model reads text only", param=param)


class RenderedChat:
    """A chat rendered by its template and completed as a text; called once, with its engine."""

    def __init__(self, ask: ChatAsk, body: bytes) -> None:
        """Raises `InvalidRequest` for tools that no engine here can call."""
        self._ask = ask
        self._toolset = toolset_of(ask)
        self._fields = _fields.decode(body)
        self._finders: dict[int, Calls] = {}
        self._usage = Usage()

    async def __call__(self, engine: Engine) -> AsyncIterator[bytes]:
        """`backends.dialect.Composed`."""
        asked = await self._asked(engine)
        if not self._ask.stream:
            yield await self._whole(engine, asked)
            return
        async for parts in self._parts(engine, asked):
            choices = [part.chunk() for part in parts if part.says]
            if choices:
                yield _sse({"object": "chat.completion.chunk", "choices": choices})
        yield _sse(
            {"object": "chat.completion.chunk", "choices": [], "usage": usage_fields(self._usage)}
        )
        yield b"data: [DONE]\n\n"

    async def _asked(self, engine: Engine) -> bytes:
        """The completion to be asked for."""
        ask, fields = self._ask, self._fields
        if not self._toolset.tools:
            fields = {name: value for name, value in fields.items() if name not in _TOOLS}
        prompt = await render(engine, _encoder.encode(fields))
        asked: dict[str, object] = {
            name: value
            for name, value in fields.items()
            if name not in _TOOLS and name not in _OF_A_CHAT
        }
        if ask.max_completion_tokens is not None:
            asked["max_tokens"] = ask.max_completion_tokens
        if ask.logprobs:
            asked["logprobs"] = max(1, ask.top_logprobs or 0)
        schema = ask.schema
        if self._toolset.forced:
            schema = calls_schema(self._toolset.tools, several=self._toolset.several)
        if schema is not None and await spells(engine):
            asked["json_schema"] = schema
        elif schema is not None:
            asked["grammar"] = grammar(schema)
        asked |= {"prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
        return _encoder.encode(asked)

    async def _parts(self, engine: Engine, asked: bytes) -> AsyncIterator[list[_Piece]]:
        """What each of the engine's chunks says."""
        async for data in engine.stream(COMPLETIONS, asked):
            event = read_event(data)
            if event is None:
                continue
            if event.usage is not None:
                self._usage = another(self._usage, event.usage)
            if event.choices:
                yield [self._part(choice) for choice in event.choices]

    def _part(self, choice: Choice) -> _Piece:
        finder = self._finders.get(choice.index)
        opens = finder is None
        if finder is None:
            finder = Calls(self._toolset.names, listed_only=self._toolset.forced)
            self._finders[choice.index] = finder
        ended = choice.finish_reason is not None
        deltas = finder.push(choice.text, whole=ended)
        scores = [] if choice.logprobs is None else trimmed(choice.logprobs.content, self._ask)
        reason = choice.finish_reason
        return _Piece(
            index=choice.index,
            opens=opens,
            deltas=deltas,
            scores=scores,
            finish_reason="tool_calls" if reason == "stop" and finder.count else reason,
        )

    async def _whole(self, engine: Engine, asked: bytes) -> bytes:
        answers: dict[int, _Piece] = {}
        async for parts in self._parts(engine, asked):
            for part in parts:
                answer = answers.setdefault(part.index, part)
                if answer is not part:
                    answer.deltas += part.deltas
                    answer.scores += part.scores
                    answer.finish_reason = part.finish_reason or answer.finish_reason
        choices = [
            {
                "index": index,
                "message": {"role": "assistant"} | message_fields(answers[index].deltas),
                "logprobs": answers[index].logprobs,
                "finish_reason": answers[index].finish_reason,
            }
            for index in sorted(answers)
        ]
        return _encoder.encode(
            {"object": "chat.completion", "choices": choices, "usage": usage_fields(self._usage)}
        )


class _Piece(msgspec.Struct, kw_only=True):
    """More of one answer."""

    index: int
    opens: bool
    """Whether it is the first of it."""
    deltas: list[Delta]
    scores: list[Token]
    finish_reason: str | None

    @property
    def logprobs(self) -> dict[str, object] | None:
        return {"content": self.scores, "refusal": None} if self.scores else None

    @property
    def says(self) -> bool:
        return bool(self.opens or self.deltas or self.scores or self.finish_reason)

    def chunk(self) -> dict[str, object]:
        """The choice of a streamed chunk."""
        role = {"role": "assistant"} if self.opens else {}
        return {
            "index": self.index,
            "delta": role | delta_fields(self.deltas),
            "logprobs": self.logprobs,
            "finish_reason": self.finish_reason,
        }


class MendedChat:
    """A chat of which the engine's answer lacks something: log probabilities without alternatives
    (it tells none at all, so it is asked for one, which is left out), or the count of tokens of
    all answers (it counts one). Called once, with its engine."""

    def __init__(self, ask: ChatAsk, body: bytes, *, at_once: int) -> None:
        """`at_once`: answers that the engine is asked for at the same time."""
        self._stream = ask.stream
        self._answers = ask.n or 1
        self._seed = ask.seed
        self._clears = ask.scores_only
        self._at_once = asyncio.Semaphore(at_once)
        self._fields = _fields.decode(body)
        if self._clears:
            self._fields |= {"logprobs": Raw(b"true"), "top_logprobs": Raw(b"1")}

    async def __call__(self, engine: Engine) -> AsyncIterator[bytes]:
        """`backends.dialect.Composed`."""
        if not self._stream:
            yield _encoder.encode(await self._whole(engine))
            return
        usage = Usage()
        asked = self._fields | {"stream_options": Raw(b'{"include_usage":true}')}
        async for data in engine.stream(CHATS, _encoder.encode(asked)):
            event = read_event(data)
            if event is None:
                continue
            if event.usage is not None:
                usage = another(usage, event.usage)
            if event.choices:
                yield b"data: " + (self._cleared(data) if self._clears else data) + b"\n\n"
        yield _sse({"object": "chat.completion.chunk", "choices": [], "usage": usage_fields(usage)})
        yield b"data: [DONE]\n\n"

    async def _whole(self, engine: Engine) -> dict[str, Any]:
        with single_error():
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._one(engine, number), name="llamacpp-answer")
                    for number in range(self._answers)
                ]
        answers = [task.result() for task in tasks]
        usage = Usage()
        for number, answer in enumerate(answers):
            answer["choices"][0]["index"] = number
            usage = another(usage, msgspec.convert(answer["usage"], Usage))
        choices = [answer["choices"][0] for answer in answers]
        return answers[0] | {"choices": choices, "usage": usage_fields(usage)}

    async def _one(self, engine: Engine, number: int) -> dict[str, Any]:
        asked: dict[str, Any] = self._fields | {"n": 1}
        if self._seed is not None:
            asked["seed"] = self._seed + number
        async with self._at_once:
            said = await engine.ask(CHATS, _encoder.encode(asked))
        answer: dict[str, Any] = msgspec.json.decode(self._cleared(said) if self._clears else said)
        return answer

    def _cleared(self, data: bytes) -> bytes:
        said = msgspec.json.decode(data)
        for choice in said["choices"]:
            for token in (choice.get("logprobs") or {}).get("content") or ():
                token["top_logprobs"] = []
        return _encoder.encode(said)


def trimmed(tokens: list[Token], ask: ChatAsk) -> list[Token]:
    """With as many alternatives as were asked for."""
    count = ask.top_logprobs or 0
    replace = msgspec.structs.replace
    return [replace(token, top_logprobs=token.top_logprobs[:count]) for token in tokens]


def _sse(body: dict[str, object]) -> bytes:
    return b"data: " + _encoder.encode(body) + b"\n\n"
