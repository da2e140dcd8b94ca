"""The messages of a chat, by role, and the parts of their content, by type."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from serverlessllm.openai.request.errors import MissingParameter
from serverlessllm.openai.request.patterns import DATA_URL

DataURL: TypeAlias = Annotated[str, Meta(pattern=DATA_URL)]


class _Value(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Made by the thousand, and never part of a cycle: the collector need not look at it."""


class _Part(_Value, frozen=True, kw_only=True, gc=False, tag_field="type"):
    """A piece of a message's content; `type` tells which."""


class _Message(_Value, frozen=True, kw_only=True, gc=False, tag_field="role"):
    """A message; `role` tells whose."""


class Text(_Value, frozen=True, kw_only=True, gc=False):
    """A text, where nothing else can be."""

    type: Literal["text"]
    text: str


class TextPart(_Part, frozen=True, kw_only=True, gc=False, tag="text"):
    """A text."""

    text: str


class ImageURL(_Value, frozen=True, kw_only=True, gc=False):
    """An image, inline: nothing is fetched for a client."""

    url: DataURL
    """`data:image/png;base64,…`"""
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Part, frozen=True, kw_only=True, gc=False, tag="image_url"):
    """An image."""

    image_url: ImageURL


class InputAudio(_Value, frozen=True, kw_only=True, gc=False):
    """A recording, inline."""

    data: str
    """Base64."""
    format: Literal["wav", "mp3"]


class AudioPart(_Part, frozen=True, kw_only=True, gc=False, tag="input_audio"):
    """A recording."""

    input_audio: InputAudio


class FileFields(_Value, frozen=True, kw_only=True, gc=False):
    """A file, inline, or the id of an uploaded one."""

    file_data: DataURL | None = None
    """`data:application/pdf;base64,…`"""
    file_id: str | None = None
    filename: str | None = None


class FilePart(_Part, frozen=True, kw_only=True, gc=False, tag="file"):
    """A file."""

    file: FileFields


class RefusalPart(_Part, frozen=True, kw_only=True, gc=False, tag="refusal"):
    """What a model said instead of an answer."""

    refusal: str


Texts: TypeAlias = str | Annotated[list[Text], Meta(min_length=1)]
UserParts: TypeAlias = Annotated[
    list[TextPart | ImagePart | AudioPart | FilePart], Meta(min_length=1)
]
AssistantParts: TypeAlias = Annotated[list[TextPart | RefusalPart], Meta(min_length=1)]


class FunctionCall(_Value, frozen=True, kw_only=True, gc=False):
    """A function that the model called."""

    name: str
    arguments: str
    """JSON, as the model wrote it."""


class CustomCall(_Value, frozen=True, kw_only=True, gc=False):
    """A custom tool that the model called."""

    name: str
    input: str


class FunctionToolCall(
    _Value, frozen=True, kw_only=True, gc=False, tag_field="type", tag="function"
):
    """A call of a function."""

    id: str
    function: FunctionCall


class CustomToolCall(_Value, frozen=True, kw_only=True, gc=False, tag_field="type", tag="custom"):
    """A call of a custom tool."""

    id: str
    custom: CustomCall


class EarlierAudio(_Value, frozen=True, kw_only=True, gc=False):
    """An audio answer given earlier."""

    id: str


class SystemMessage(_Message, frozen=True, kw_only=True, gc=False, tag="system"):
    """What the model shall do, whatever the user says."""

    content: Texts
    name: str | None = None


class DeveloperMessage(_Message, frozen=True, kw_only=True, gc=False, tag="developer"):
    """What the model shall do; newer models' word for `system`."""

    content: Texts
    name: str | None = None


class UserMessage(_Message, frozen=True, kw_only=True, gc=False, tag="user"):
    """What the user says."""

    content: str | UserParts
    name: str | None = None


class AssistantMessage(_Message, frozen=True, kw_only=True, gc=False, tag="assistant"):
    """What the model said: `content`, calls of tools, or both."""

    content: str | AssistantParts | None = None
    tool_calls: list[FunctionToolCall | CustomToolCall] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """What the model thought, where its server tells it."""
    function_call: FunctionCall | None = None
    """Deprecated for `tool_calls`."""
    audio: EarlierAudio | None = None
    name: str | None = None


class ToolMessage(_Message, frozen=True, kw_only=True, gc=False, tag="tool"):
    """What a tool answered."""

    content: Texts
    tool_call_id: str
    """The call that it answers."""


class FunctionMessage(_Message, frozen=True, kw_only=True, gc=False, tag="function"):
    """What a function answered; deprecated for `tool`."""

    content: str | None
    name: str


Message: TypeAlias = (
    SystemMessage
    | DeveloperMessage
    | UserMessage
    | AssistantMessage
    | ToolMessage
    | FunctionMessage
)


def check_assistant(place: int, message: AssistantMessage) -> None:
    """Raise `MissingParameter` when the message at `place` says nothing at all."""
    if message.content is not None or message.tool_calls or message.refusal is not None:
        return
    if (
        message.function_call is None
        and message.audio is None
        and message.reasoning_content is None
    ):
        param = f"messages[{place}].content"
        raise MissingParameter(
            f"{param}: an assistant's message has content, tool_calls, or both", param=param
        )
