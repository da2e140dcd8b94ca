"""What the fake engine is asked: bodies of the API, and which tokens each answer will be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from serverlessllm.backends.inside.fake_words import pieces_of, token_at, value_of
from serverlessllm.backends.tools import ToolFields, toolset_of
from serverlessllm.core.errors import InvalidRequest
from serverlessllm.edge.server import Request
from serverlessllm.openai.request.tools import (
    JSONAnswer,
    ResponseFormat,
    SchemaAnswer,
    Tool,
    ToolChoice,
)

Count = Annotated[int, Meta(ge=0)]
Several = Annotated[int, Meta(ge=1, le=128)]
Texts = str | Annotated[list[str | int | list[int]], Meta(min_length=1)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class Message(msgspec.Struct, frozen=True):
    role: str
    content: object = None
    tool_calls: object = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(str(part.get("text", "")) for part in self.content)
        return str(self.content)


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and completions have in common."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Several | None = None
    stop: str | list[str] | None = None
    seed: int | None = None

    @property
    def tokens_max(self) -> int | None:
        asked = self.max_completion_tokens
        return self.max_tokens if asked is None else asked

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def salted(self, prompt: str, answer: int) -> str:
        """What the tokens of the `answer`-th answer are made from."""
        salt = "" if self.seed is None else f"{self.seed} "
        return f"{salt}{prompt}" if answer == 0 else f"{salt}{answer} {prompt}"


class Call(msgspec.Struct, frozen=True):
    """Of a function."""

    name: str
    arguments: object


class ChatAsk(Ask, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None

    @property
    def prompt(self) -> str:
        return "\n".join(f"{message.role}: {message.text}" for message in self.messages)

    def call(self) -> Call | None:
        """The call that the answer is: the first that it must make, or that the user names."""
        toolset = toolset_of(ToolFields(tools=self.tools, tool_choice=self.tool_choice))
        last = self.messages[-1]
        for tool in toolset.tools:
            function = tool.function
            if toolset.forced or (last.role == "user" and function.name in last.text):
                return Call(function.name, value_of(_plain(function.parameters or {})))
        return None

    def form(self) -> object:
        """The value that a structured answer is; None: it is any text."""
        if isinstance(self.response_format, SchemaAnswer):
            return value_of(_plain(self.response_format.json_schema.schema or {}))
        return {} if isinstance(self.response_format, JSONAnswer) else None


class CompletionAsk(Ask, frozen=True, kw_only=True):
    prompt: Texts
    logprobs: Count | None = None
    echo: bool | None = None
    best_of: Several | None = None
    suffix: str | None = None


class EmbeddingAsk(msgspec.Struct, frozen=True):
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Several | None = None


def texts(given: Texts, decode: Callable[[list[int]], str]) -> list[str]:
    """Prompts, each as text."""
    if isinstance(given, str):
        return [given]
    ids = [item for item in given if isinstance(item, int)]
    if ids:
        return [decode(ids)]
    return [
        item if isinstance(item, str) else decode(item)
        for item in given
        if not isinstance(item, int)
    ]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, before it is made."""

    prompt: str
    """What its words are made from."""
    count: int
    finish_reason: str
    tokens: list[str] | None = None
    """None: words, each made when its time has come."""

    def token(self, number: int) -> str:
        return token_at(self.prompt, number) if self.tokens is None else self.tokens[number]


def planned(ask: Ask, prompt: str, said: str | None, count: int) -> Plan:
    """An answer of `count` words, or, if something is to be `said`, of that; or less of it."""
    tokens = None if said is None else pieces_of(said)
    whole = count if tokens is None else len(tokens)
    wanted = ask.tokens_max
    count = whole if wanted is None else min(whole, wanted)
    reason = "length" if wanted is not None and wanted < whole else "stop"
    if ask.stops:
        tokens = tokens or [token_at(prompt, number) for number in range(count)]
        before = ""
        for number in range(count):
            text = before + tokens[number]
            found = [at for stop in ask.stops if (at := text.find(stop)) >= 0]
            if found:
                tokens[number] = text[len(before) : min(found)]
                return Plan(prompt=prompt, count=number + 1, finish_reason="stop", tokens=tokens)
            before = text
    return Plan(prompt=prompt, count=count, finish_reason=reason, tokens=tokens)


def _plain(schema: object) -> Any:
    return msgspec.json.decode(msgspec.json.encode(schema))


Body = TypeVar("Body", bound=msgspec.Struct)


async def read(request: Request, type_: type[Body]) -> Body:
    """The request's body.

    Raises:
        InvalidRequest: it is not one.
    """
    try:
        return msgspec.json.decode(await request.body(), type=type_)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
