"""What a client asks for: bodies of the OpenAI API, checked, as prompts and sampling.

What the engine cannot do is refused with the field's name, never ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw

from serverlessllm.backends.inside.transformers.messages import RawMessage
from serverlessllm.backends.inside.transformers.sampling import Sampling
from serverlessllm.backends.tools import NULL, ToolFields, Toolset, toolset_of
from serverlessllm.core.errors import InvalidJSON, InvalidRequest
from serverlessllm.openai.request.tools import (
    JSONAnswer,
    ResponseFormat,
    SchemaAnswer,
    Tool,
    ToolChoice,
)

ANSWERS_MAX = 256
"""Prompts times `n` of one request."""
INPUTS_MAX = 2048
"""Of one request for embeddings: what the API allows."""
_STOPS_MAX = 16
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<field>[^`]*)`")

Count = Annotated[int, Meta(ge=1)]
Number = Annotated[int, Meta(ge=0, le=1 << 31)]


class Defaults(msgspec.Struct, frozen=True, kw_only=True):
    """How a model wants to be sampled where the client does not say: `generation_config.json`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What chats and completions share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def answers(self) -> int:
        """To each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """At the end of a stream."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer.

        Raises:
            InvalidRequest: too many.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > _STOPS_MAX:
            raise InvalidRequest(f"stop: at most {_STOPS_MAX} sequences", param="stop")
        return tuple(stops)


class ChatAsk(Ask, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[RawMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    web_search_options: None = None
    functions: Raw = NULL
    function_call: Raw = NULL
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The last message is the beginning of the answer."""

    @property
    def tokens_max(self) -> int | None:
        asked = self.max_completion_tokens
        return self.max_tokens if asked is None else asked

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def toolset(self) -> Toolset:
        """What the answer may call.

        Raises:
            InvalidRequest: tools that are no functions, or a choice of none of them.
        """
        fields = ToolFields(
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            functions=self.functions,
            function_call=self.function_call,
        )
        return toolset_of(fields)


class CompletionAsk(Ask, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | Number | list[Number]]
    max_tokens: Number | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: str | None = None

    @property
    def tokens_max(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def made(self) -> int:
        """Answers to each prompt, of which the likeliest are given."""
        return max(self.best_of or 1, self.answers)


class TokenizeAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/tokenize`: a text or a chat."""

    prompt: str | None = None
    messages: list[RawMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[Tool] | None = None
    return_token_strs: bool | None = None


class EmbeddingAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/embeddings`."""

    input: str | list[str | Number | list[Number]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None


Body = TypeVar("Body", bound=msgspec.Struct)


def read(body: bytes, type_: type[Body]) -> Body:
    """Decode and check.

    Raises:
        InvalidJSON: not JSON, or no object.
        InvalidRequest: `param` names the field that is wrong, missing, or asks for what the
            engine cannot do.
    """
    try:
        ask = msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJSON(f"the body is not JSON: {error}") from None
    if isinstance(ask, CompletionAsk):
        _check_completion(ask)
    return ask


def texts(param: str, value: str | list[str | int | list[int]], most: int) -> list[str | list[int]]:
    """A text, several, token numbers, or several lists of them: as a list of at most `most`.

    Raises:
        InvalidRequest: nothing, too many, or kinds that are mixed.
    """
    if isinstance(value, str):
        return [value]
    if not value:
        raise InvalidRequest(f"{param}: must not be empty", param=param)
    if all(isinstance(item, int) for item in value):
        return [[item for item in value if isinstance(item, int)]]
    prompts = [item for item in value if not isinstance(item, int)]
    if len(prompts) != len(value) or len({type(prompt) for prompt in prompts}) > 1:
        raise InvalidRequest(f"{param}: texts or token ids, not both", param=param)
    if len(prompts) > most:
        raise InvalidRequest(f"{param}: at most {most}", param=param)
    return prompts


def sampling(ask: ChatAsk | CompletionAsk, defaults: Defaults, answer: int) -> Sampling:
    """How the `answer`-th answer to a prompt is sampled: each by its own seed."""
    chosen_by_score = isinstance(ask, CompletionAsk) and ask.made > ask.answers
    return Sampling(
        temperature=_first(ask.temperature, defaults.temperature, 1.0),
        top_p=_first(ask.top_p, defaults.top_p, 1.0),
        top_k=max(0, int(_first(ask.top_k, defaults.top_k, 0))),
        seed=None if ask.seed is None else ask.seed + answer,
        presence_penalty=ask.presence_penalty or 0.0,
        frequency_penalty=ask.frequency_penalty or 0.0,
        repetition_penalty=_first(ask.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=_bias(ask.logit_bias),
        min_p=ask.min_p or 0.0,
        alternatives=0 if ask.alternatives is None and chosen_by_score else ask.alternatives,
    )


def schema(ask: Ask) -> dict[str, object] | None:
    """Of the answer; None: it may be any text."""
    if isinstance(ask.response_format, SchemaAnswer):
        said = ask.response_format.json_schema.schema or {}
        return msgspec.json.decode(msgspec.json.encode(said), type=dict[str, object])
    return {"type": "object"} if isinstance(ask.response_format, JSONAnswer) else None


def _first(asked: float | None, default: float | None, otherwise: float) -> float:
    if asked is not None:
        return asked
    return otherwise if default is None else default


def _bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        return {int(token): value for token, value in (bias or {}).items()}
    except ValueError:
        raise InvalidRequest("logit_bias: keys are token ids", param="logit_bias") from None


def _check_completion(ask: CompletionAsk) -> None:
    if ask.suffix and not isinstance(ask.prompt, str):
        raise InvalidRequest("suffix: only with one prompt, a text", param="suffix")
    if ask.best_of is not None and ask.best_of < ask.answers:
        raise InvalidRequest("best_of: at least n", param="best_of")
    if ask.stream and ask.made > ask.answers:
        raise InvalidRequest("best_of: at most n in a stream", param="best_of")


def _explain(text: str) -> InvalidRequest | InvalidJSON:
    """msgspec's sentence and path as our error."""
    match = _PATH.match(text)
    what, path = (text, None) if match is None else match.group("what", "path")
    missing = _MISSING.search(what)
    if missing is not None:
        param = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequest(f"{param}: this field is required", param=param)
    if not path:
        return InvalidJSON("the body must be a JSON object")
    return InvalidRequest(f"{path}: {what[:1].lower()}{what[1:]}", param=path)
