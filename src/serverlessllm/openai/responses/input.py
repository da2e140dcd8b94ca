"""`input` of a response: a text, or items of several kinds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec
from msgspec import Raw, Struct

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.reading import (
    is_given,
    kind_of,
    read_piece,
    read_text_or_pieces,
    unsupported,
)
from serverlessllm.openai.responses.items import (
    Content,
    FunctionCall,
    FunctionCallOutput,
    InputAudio,
    InputImage,
    InputText,
    Item,
    ItemReference,
    Message,
    OutputText,
    Reasoning,
    Refusal,
)
from serverlessllm.openai.settings import RequestLimits

_KNOWN_ITEMS = (
    "send message, function_call, function_call_output, reasoning or item_reference items"
)
_KNOWN_PARTS = "send input_text, input_image or input_audio"


class _Identified(Struct):
    id: str | None = None
    role: str | None = None


class _Message(Struct):
    role: Literal["user", "system", "developer", "assistant"]
    content: Raw
    id: str | None = None


class _Call(Struct):
    call_id: str
    name: str
    arguments: str
    id: str | None = None


class _Output(Struct):
    call_id: str
    output: Raw
    id: str | None = None


class _Text(Struct):
    text: str


class _Refusal(Struct):
    refusal: str


class _Image(Struct):
    image_url: str | None = None
    detail: Literal["low", "high", "auto", "original"] | None = None


class _AudioData(Struct):
    data: str
    format: str


class _Audio(Struct):
    input_audio: _AudioData


class _Reference(Struct):
    id: str


_identified = msgspec.json.Decoder(_Identified)
_message = msgspec.json.Decoder(_Message)
_call = msgspec.json.Decoder(_Call)
_output = msgspec.json.Decoder(_Output)
_reference = msgspec.json.Decoder(_Reference)
_text = msgspec.json.Decoder(_Text)
_refusal = msgspec.json.Decoder(_Refusal)
_image = msgspec.json.Decoder(_Image)
_audio = msgspec.json.Decoder(_Audio)


def read_items(given: Raw, limits: RequestLimits, uid: str) -> tuple[Item | ItemReference, ...]:
    """The items of `input`; those without an id get one of their own.

    Raises:
        InvalidRequest: what is wrong with one, at its path.
    """
    if not is_given(given):
        return ()
    found = read_text_or_pieces(given, "input")
    if isinstance(found, str):
        return (Message(id=f"msg_{uid}i0", role="user", content=(InputText(text=found),)),)
    if len(found) > limits.messages_max:
        raise InvalidRequest(f"input: at most {limits.messages_max} items", param="input")
    return tuple(_read_item(piece, f"input[{i}]", f"{uid}i{i}") for i, piece in enumerate(found))


def _read_item(piece: Raw, path: str, uid: str) -> Item | ItemReference:
    kind = kind_of(piece, path)
    if kind is None:
        kind = "message" if read_piece(piece, _identified, path).role else "item_reference"
    if kind == "message":
        message = read_piece(piece, _message, path)
        content = _read_content(message.content, f"{path}.content", message.role)
        return Message(id=message.id or f"msg_{uid}", role=message.role, content=content)
    if kind == "function_call":
        call = read_piece(piece, _call, path)
        return FunctionCall(
            id=call.id or f"fc_{uid}",
            call_id=call.call_id,
            name=call.name,
            arguments=call.arguments,
        )
    if kind == "function_call_output":
        told = read_piece(piece, _output, path)
        return FunctionCallOutput(
            id=told.id or f"fco_{uid}",
            call_id=told.call_id,
            output=_read_output(told.output, f"{path}.output"),
        )
    if kind == "reasoning":
        # What a model thought before is no part of what it is asked next.
        return Reasoning(id=read_piece(piece, _identified, path).id or f"rs_{uid}")
    if kind == "item_reference":
        return ItemReference(id=read_piece(piece, _reference, path).id)
    raise unsupported(f"{path}.type", kind, _KNOWN_ITEMS)


def _read_content(given: Raw, path: str, role: str) -> tuple[Content, ...]:
    found = read_text_or_pieces(given, path)
    says = OutputText if role == "assistant" else InputText
    if isinstance(found, str):
        return (says(text=found),)
    parts = tuple(_read_part(piece, f"{path}[{i}]") for i, piece in enumerate(found))
    if role == "assistant":
        return tuple(_as_output(parts, path))
    return parts


def _as_output(parts: Iterable[Content], path: str) -> Iterable[Content]:
    for i, part in enumerate(parts):
        if isinstance(part, InputImage | InputAudio):
            raise unsupported(f"{path}[{i}]", "media", "an assistant's message is text")
        yield OutputText(text=part.text) if isinstance(part, InputText) else part


def _read_output(given: Raw, path: str) -> str | tuple[InputText | InputImage | InputAudio, ...]:
    found = read_text_or_pieces(given, path)
    if isinstance(found, str):
        return found
    parts: list[InputText | InputImage | InputAudio] = []
    for i, piece in enumerate(found):
        part = _read_part(piece, f"{path}[{i}]")
        if isinstance(part, OutputText | Refusal):
            raise unsupported(f"{path}[{i}].type", "output", _KNOWN_PARTS)
        parts.append(part)
    return tuple(parts)


def _read_part(piece: Raw, path: str) -> Content:
    kind = kind_of(piece, path) or ""
    if kind in {"input_text", "text"}:
        return InputText(text=read_piece(piece, _text, path).text)
    if kind == "output_text":
        return OutputText(text=read_piece(piece, _text, path).text)
    if kind == "refusal":
        return Refusal(refusal=read_piece(piece, _refusal, path).refusal)
    if kind == "input_image":
        image = read_piece(piece, _image, path)
        if image.image_url is None:
            param = f"{path}.image_url"
            raise InvalidRequest(f"{param}: send the image inline, as a data: URL", param=param)
        return InputImage(image_url=image.image_url, detail=image.detail or "auto")
    if kind == "input_audio":
        audio = read_piece(piece, _audio, path).input_audio
        return InputAudio(data=audio.data, format=audio.format)
    raise unsupported(f"{path}.type", kind, _KNOWN_PARTS)
