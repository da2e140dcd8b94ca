"""Chats that llama.cpp's server does not answer as the API has it.

Where an answer is made to be a call, and where its own constraints fail (see `gbnf`), the chat is
rendered by its template and completed as a text; calls are found in that text by us.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from msgspec import Raw

from serverlessllm.backends.calls import Calls
from serverlessllm.backends.dialect import Engine
from serverlessllm.backends.gbnf import grammar
from serverlessllm.backends.llamacpp_wire import (
    COMPLETIONS,
    Choice,
    Token,
    Usage,
    add_usage,
    read_event,
    render,
    spells,
    usage_fields,
)
from serverlessllm.backends.tools import ToolFields, calls_schema, offered
from serverlessllm.openai.request.tools import JSONAnswer, ResponseFormat, SchemaAnswer

CHATS = "/v1/chat/completions"
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call")
_OF_A_CHAT = ("messages", "response_format", "logprobs", "top_logprobs", "stream_options")
_encoder = msgspec.json.Encoder()
_fields = msgspec.json.Decoder(dict[str, Raw])


class ChatAsk(ToolFields, frozen=True, kw_only=True):
    """What decides how a chat is put to the engine."""

    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None

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


class RenderedChat:
    """A chat rendered by its template and completed as a text; called once, with its engine."""

    def __init__(self, ask: ChatAsk, body: bytes) -> None:
        """Raises `InvalidRequest` for tools that no engine here can call."""
        self._ask = ask
        self._offer = offered(ask)
        self._fields = _fields.decode(body)
        self._finders: dict[int, Calls] = {}
        self._usage = Usage()

    async def __call__(self, engine: Engine) -> AsyncIterator[bytes]:
        """`backends.dialect.Composed`."""
        asked = await self._asked(engine)
        if not self._ask.stream:
            yield await self._whole(engine, asked)
            return
        async for choices in self._chunks(engine, asked):
            yield _sse({"object": "chat.completion.chunk", "choices": choices})
        yield _sse(
            {"object": "chat.completion.chunk", "choices": [], "usage": usage_fields(self._usage)}
        )
        yield b"data: [DONE]\n\n"

    async def _asked(self, engine: Engine) -> bytes:
        """The completion to be asked for."""
        ask, fields = self._ask, self._fields
        if not self._offer.tools:
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
        if self._offer.forced:
            schema = calls_schema(self._offer.tools, several=self._offer.several)
        if schema is not None and await spells(engine):
            asked["json_schema"] = schema
        elif schema is not None:
            asked["grammar"] = grammar(schema)
        asked |= {"prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
        return _encoder.encode(asked)

    async def _chunks(self, engine: Engine, asked: bytes) -> AsyncIterator[list[dict[str, object]]]:
        """The choices of each chunk."""
        async for data in engine.stream(COMPLETIONS, asked):
            event = read_event(data)
            if event is None:
                continue
            if event.usage is not None:
                self._usage = add_usage(self._usage, event.usage)
            choices = [one for choice in event.choices for one in self._choice(choice)]
            if choices:
                yield choices

    def _choice(self, choice: Choice) -> list[dict[str, object]]:
        """What one of the engine's chunks says, in ours; the first one has its scores."""
        opened = choice.index in self._finders
        finder = self._finders.setdefault(
            choice.index, Calls(self._offer.names, listed_only=self._offer.forced)
        )
        deltas = finder.push(choice.text, whole=choice.finish_reason is not None)
        ended = choice.finish_reason is not None
        scores = None if choice.logprobs is None else trimmed(choice.logprobs.content, self._ask)
        parts = [delta.field() for delta in deltas]
        if not parts and (ended or scores or not opened):
            parts.append({})
        if parts and not opened:
            parts[0] = {"role": "assistant"} | parts[0]
        reason = choice.finish_reason
        if reason == "stop" and finder.count:
            reason = "tool_calls"
        last = len(parts) - 1
        return [
            {
                "index": choice.index,
                "delta": part,
                "logprobs": {"content": scores, "refusal": None} if scores and not place else None,
                "finish_reason": reason if place == last else None,
            }
            for place, part in enumerate(parts)
        ]

    async def _whole(self, engine: Engine, asked: bytes) -> bytes:
        answers: dict[int, _Message] = {}
        async for choices in self._chunks(engine, asked):
            for choice in choices:
                message = answers.setdefault(_number(choice["index"]), _Message())
                message.take(choice)
        choices = [answers[index].choice(index) for index in sorted(answers)]
        return _encoder.encode(
            {"object": "chat.completion", "choices": choices, "usage": usage_fields(self._usage)}
        )


class _Message:
    """A whole answer, from its chunks."""

    def __init__(self) -> None:
        self._text = ""
        self._calls: list[dict[str, Any]] = []
        self._scores: list[Any] = []
        self._reason: object = None

    def take(self, choice: dict[str, Any]) -> None:
        delta = choice["delta"]
        self._text += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                self._calls.append({key: part[key] for key in ("id", "type", "function")})
            else:
                called = self._calls[part["index"]]["function"]
                called["arguments"] += part["function"]["arguments"]
        if choice["logprobs"]:
            self._scores += choice["logprobs"]["content"]
        self._reason = choice["finish_reason"] or self._reason

    def choice(self, index: int) -> dict[str, object]:
        message: dict[str, object] = {"role": "assistant", "content": self._text}
        if self._calls:
            message |= {"content": self._text or None, "tool_calls": self._calls}
        scores = {"content": self._scores, "refusal": None} if self._scores else None
        return {
            "index": index,
            "message": message,
            "logprobs": scores,
            "finish_reason": self._reason,
        }


class ScoredChat:
    """A chat whose tokens are to be told without alternatives, which the engine tells not at all:
    it is asked for one, which is left out."""

    def __init__(self, ask: ChatAsk, body: bytes) -> None:
        self._ask = ask
        fields = _fields.decode(body)
        fields |= {"logprobs": Raw(b"true"), "top_logprobs": Raw(b"1")}
        self._body = _encoder.encode(fields)

    async def __call__(self, engine: Engine) -> AsyncIterator[bytes]:
        """`backends.dialect.Composed`."""
        if not self._ask.stream:
            yield self._cleared(await engine.ask(CHATS, self._body))
            return
        async for data in engine.stream(CHATS, self._body):
            yield b"data: " + self._cleared(data) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _cleared(self, data: bytes) -> bytes:
        said = msgspec.json.decode(data)
        for choice in (said or {}).get("choices", ()):
            for token in (choice.get("logprobs") or {}).get("content") or ():
                token["top_logprobs"] = []
        return _encoder.encode(said)


def trimmed(tokens: list[Token], ask: ChatAsk) -> list[Token]:
    """With as many alternatives as were asked for."""
    count = ask.top_logprobs or 0
    replace = msgspec.structs.replace
    return [replace(token, top_logprobs=token.top_logprobs[:count]) for token in tokens]


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def _sse(body: dict[str, object]) -> bytes:
    return b"data: " + _encoder.encode(body) + b"\n\n"
