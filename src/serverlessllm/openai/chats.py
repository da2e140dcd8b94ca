"""A chat as whoever translates another dialect writes its request and reads its answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
from msgspec import Raw, Struct

from serverlessllm.core.errors import BackendProtocolError, SLLMError
from serverlessllm.openai.errors import ErrorFields

CHAT_PATH = "/v1/chat/completions"
COUNT_PATH = "/v1/tokenize"
Loading = dict[str, Raw]
"""How far a model's load is, as the chat says it."""
OWN_FIELDS = frozenset(
    {
        *("audio", "function_call", "functions", "logprobs", "max_completion_tokens"),
        *("max_tokens", "messages", "modalities", "model", "n", "prediction"),
        *("reasoning_effort", "response_format", "stream", "stream_options", "tool_choice"),
        *("tools", "top_logprobs", "web_search_options"),
    }
)
"""Fields of a chat that a translation decides: of the same name in another dialect they would
mean something else, or contradict it."""


class TextPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    text: str


class ImageURL(Struct, frozen=True, kw_only=True, omit_defaults=True):
    url: str
    detail: str | None = None


class ImagePart(Struct, frozen=True, kw_only=True, tag_field="type", tag="image_url"):
    image_url: ImageURL


class AudioData(Struct, frozen=True, kw_only=True):
    data: str
    format: str


class AudioPart(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_audio"):
    input_audio: AudioData


Part = TextPart | ImagePart | AudioPart


class CalledFunction(Struct, frozen=True, kw_only=True):
    name: str
    arguments: str


class ToolCall(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    id: str
    function: CalledFunction


class ChatMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | tuple[Part, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Function(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: Raw | None = None
    strict: bool | None = None


class Tool(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    function: Function


class NamedFunction(Struct, frozen=True, kw_only=True):
    name: str


class ToolChoice(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    function: NamedFunction


class Schema(Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: str
    description: str | None = None
    schema: Raw | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True, kw_only=True, omit_defaults=True):
    type: Literal["json_object", "json_schema"]
    json_schema: Schema | None = None


class StreamOptions(Struct, frozen=True, kw_only=True):
    include_usage: bool


class ChatRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a translation says of a chat; unset fields are left to the engine."""

    model: str
    messages: tuple[ChatMessage, ...]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    user: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The last message is the beginning of the answer: no new one is to be begun."""


class CountRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What `/v1/tokenize` takes of a chat."""

    model: str
    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()


class Chat(Struct, frozen=True, kw_only=True):
    """A translated request on its way."""

    body: bytes
    places: tuple[str, ...]
    """Where in the client's own request each message comes from; empty: nowhere."""


class _PromptDetails(Struct, frozen=True):
    cached_tokens: int | None = None


class _CompletionDetails(Struct, frozen=True):
    reasoning_tokens: int | None = None


class ChatUsage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Of the prompt: those that needed no computing."""
        details = self.prompt_tokens_details
        return 0 if details is None else details.cached_tokens or 0

    @property
    def reasoning_tokens(self) -> int:
        """Of the answer: those that are not shown as text."""
        details = self.completion_tokens_details
        return 0 if details is None else details.reasoning_tokens or 0


class TopLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    top_logprobs: tuple[TopLogprob, ...] = ()


class ChoiceLogprobs(Struct, frozen=True):
    content: tuple[TokenLogprob, ...] | None = None


class FunctionPiece(Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallPiece(Struct, frozen=True):
    index: int | None = None
    id: str | None = None
    function: FunctionPiece | None = None


class Delta(Struct, frozen=True):
    """A piece of an answer, or (a message) all of it."""

    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCallPiece, ...] | None = None


_NOTHING = Delta()


class Choice(Struct, frozen=True, kw_only=True):
    """The first and only choice of a chunk, or of a whole answer."""

    delta: Delta | None = None
    message: Delta | None = None
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None
    stop_reason: str | int | None = None
    """The stop sequence (or token) that ended it, where the engine tells."""

    @property
    def said(self) -> Delta:
        """What it adds."""
        return self.delta or self.message or _NOTHING

    @property
    def stopped_by(self) -> str | None:
        """The stop sequence that ended it, where the engine tells."""
        return self.stop_reason if isinstance(self.stop_reason, str) else None


class ChatAnswer(Struct, frozen=True, kw_only=True):
    """A whole answer, or one chunk of a streamed one."""

    choices: tuple[Choice, ...] = ()
    usage: ChatUsage | None = None
    loading: Loading | None = None
    """How far the model's load is, of a chunk that says nothing else."""
    error: ErrorFields | None = None
    """Why the stream ends here."""


class Failure(Struct, frozen=True, kw_only=True):
    """Why there is no answer, as the chat said it."""

    status: int
    """Of the answer; 0 inside a stream."""
    error: ErrorFields
    loading: Loading | None = None
    """How far the model's load is."""


class _FailureBody(Struct, frozen=True, omit_defaults=True):
    error: ErrorFields
    loading: Loading | None = None


class _Counted(Struct, frozen=True):
    count: int


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_message_path = re.compile(r"messages\[(\d+)\](\.content\[\d+\])?")
_encoder = msgspec.json.Encoder()
_answer = msgspec.json.Decoder(ChatAnswer)
_count = msgspec.json.Decoder(_Counted)
_failure = msgspec.json.Decoder(_FailureBody)


def write_chat(request: ChatRequest, extras: Mapping[str, Raw]) -> bytes:
    """The body of a chat; `extras` are fields that pass through as they came."""
    body = _encoder.encode(request)
    if not extras:
        return body
    return b"%b,%b" % (body[:-1], _encoder.encode(extras)[1:])


def read_answer(data: bytes) -> ChatAnswer:
    """A whole answer or the data of one event.

    Raises:
        BackendProtocolError: it is neither.
    """
    try:
        return _answer.decode(data)
    except _UNREADABLE as error:
        raise BackendProtocolError("the model's backend answered with something else") from error


def read_failure(status: int, body: bytes) -> Failure:
    """An answer that is an error.

    Raises:
        BackendProtocolError: it is not told by the contract.
    """
    try:
        said = _failure.decode(body)
    except _UNREADABLE as error:
        raise BackendProtocolError("the error could not be read") from error
    return Failure(status=status, error=said.error, loading=said.loading)


def failure_of(error: SLLMError) -> Failure:
    """One of our own errors."""
    fields = ErrorFields(message=error.message, type=error.type, param=error.param, code=error.code)
    return Failure(status=error.status, error=fields)


def failure_body(failure: Failure) -> bytes:
    """The JSON body that says so, by the error contract."""
    return _encoder.encode(_FailureBody(failure.error, failure.loading))


def read_count(body: bytes) -> int:
    """What `/v1/tokenize` counted; raises `BackendProtocolError`."""
    try:
        return _count.decode(body).count
    except _UNREADABLE as error:
        raise BackendProtocolError("the model's backend counted no tokens") from error


def said_plainly(parts: Sequence[Part]) -> str | tuple[Part, ...]:
    """A message's content: one text is no list, for every chat template takes it so."""
    if not parts:
        return ""
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return parts[0].text
    return tuple(parts)


def in_own_words(
    failure: Failure, chat: Chat, messages: str, own_param: Callable[[str], str | None]
) -> Failure:
    """What the chat complained of, by the client's own names: `messages` is what it has in the
    place of the chat's, `own_param` knows its name for any other field, None: it has none."""
    param = failure.error.param
    if param is None:
        return failure
    found = _message_path.match(param)
    own = own_param(param) if found is None else _place_of(found, chat, messages)
    return msgspec.structs.replace(failure, error=_reworded(failure.error, param, own))


def _place_of(found: re.Match[str], chat: Chat, elsewhere: str) -> str:
    """Where in the client's request a message, or a part of its content, comes from. Parts have
    kept their numbers unless the place says more than which message it is."""
    number, part = int(found[1]), found[2]
    if number >= len(chat.places):
        return elsewhere
    place = chat.places[number]
    return f"{place}{part}" if part and place.endswith("]") else place


def _reworded(error: ErrorFields, param: str, own: str | None) -> ErrorFields:
    """The message begins with the field's name, and goes on without it where there is none."""
    message = error.message
    if message.startswith(f"{param}: "):
        rest = message.removeprefix(f"{param}: ")
        message = f"{own}: {rest}" if own else rest
    return msgspec.structs.replace(error, message=message, param=own)
