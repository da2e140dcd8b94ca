"""Messages of a prompt: each a text, or blocks of several kinds."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Raw, Struct

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.reading import (
    NOTHING,
    is_given,
    kind_of,
    read_piece,
    read_text_or_pieces,
    unsupported,
)

_KNOWN = "send text, image, tool_use or tool_result blocks"
_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
"""What a model thought before is no part of what it is asked next."""


class Text(Struct, frozen=True, kw_only=True):
    text: str


class Image(Struct, frozen=True, kw_only=True):
    url: str
    """A data: URL, unless the client has sent another."""


class ToolUse(Struct, frozen=True, kw_only=True):
    id: str
    name: str
    input: dict[str, Raw]


class ToolResult(Struct, frozen=True, kw_only=True):
    tool_use_id: str
    content: tuple[Text | Image, ...]


Block = Text | Image | ToolUse | ToolResult


class Turn(Struct, frozen=True, kw_only=True):
    """One message."""

    role: Literal["user", "assistant", "system"]
    blocks: tuple[Block, ...]


class _Source(Struct, frozen=True):
    type: str
    media_type: str = ""
    data: str = ""
    url: str = ""


class _Image(Struct, frozen=True):
    source: _Source


class _Result(Struct, frozen=True):
    tool_use_id: str
    content: Raw = NOTHING


_text = msgspec.json.Decoder(Text)
_image = msgspec.json.Decoder(_Image)
_use = msgspec.json.Decoder(ToolUse)
_result = msgspec.json.Decoder(_Result)


def read_system(given: Raw, path: str) -> str:
    """A system prompt, its blocks as paragraphs; raises `InvalidRequest` unless all are text."""
    if not is_given(given):
        return ""
    return "\n\n".join(block.text for block in _read_texts(given, path))


def read_turn(role: Literal["user", "assistant", "system"], content: Raw, path: str) -> Turn:
    """One message; raises `InvalidRequest` for a block that has no place in it."""
    if role == "system":
        return Turn(role=role, blocks=tuple(_read_texts(content, path)))
    blocks: list[Block] = []
    for place, piece in _pieces(content, path):
        if isinstance(piece, str):
            return Turn(role=role, blocks=(Text(text=piece),))
        block = _read_block(piece, place)
        if block is None:
            continue
        misplaced = ToolResult | Image if role == "assistant" else ToolUse
        if isinstance(block, misplaced):
            param = f"{place}.type"
            raise InvalidRequest(f"{param}: not in a message of role {role!r}", param=param)
        blocks.append(block)
    return Turn(role=role, blocks=tuple(blocks))


def _pieces(content: Raw, path: str) -> list[tuple[str, Raw | str]]:
    """Each block and where it lies; a text is the only one of its message."""
    found = read_text_or_pieces(content, path)
    if isinstance(found, str):
        return [(path, found)]
    return [(f"{path}[{i}]", piece) for i, piece in enumerate(found)]


def _read_texts(content: Raw, path: str) -> list[Text]:
    found: list[Text] = []
    for place, piece in _pieces(content, path):
        if isinstance(piece, str):
            return [Text(text=piece)]
        kind = kind_of(piece, place)
        if kind != "text":
            raise unsupported(f"{place}.type", kind or "", "send text blocks")
        found.append(read_piece(piece, _text, place))
    return found


def _read_block(piece: Raw, path: str) -> Block | None:
    """None: a block that is left out."""
    kind = kind_of(piece, path) or ""
    if kind == "text":
        return read_piece(piece, _text, path)
    if kind == "image":
        return _read_image(piece, path)
    if kind == "tool_use":
        return read_piece(piece, _use, path)
    if kind == "tool_result":
        result = read_piece(piece, _result, path)
        return ToolResult(
            tool_use_id=result.tool_use_id,
            content=_read_result(result.content, f"{path}.content"),
        )
    if kind in _THOUGHTS:
        return None
    raise unsupported(f"{path}.type", kind, _KNOWN)


def _read_image(piece: Raw, path: str) -> Image:
    source = read_piece(piece, _image, path).source
    if source.type == "base64":
        return Image(url=f"data:{source.media_type};base64,{source.data}")
    if source.type == "url":
        return Image(url=source.url)
    raise unsupported(f"{path}.source.type", source.type, "send base64")


def _read_result(content: Raw, path: str) -> tuple[Text | Image, ...]:
    if not is_given(content):
        return ()
    found: list[Text | Image] = []
    for place, piece in _pieces(content, path):
        if isinstance(piece, str):
            return (Text(text=piece),)
        kind = kind_of(piece, place) or ""
        if kind == "text":
            found.append(read_piece(piece, _text, place))
        elif kind == "image":
            found.append(_read_image(piece, place))
        else:
            raise unsupported(f"{place}.type", kind, "send text or image blocks")
    return tuple(found)
