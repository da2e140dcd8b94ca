"""Tools, the choice among them, and the text's format."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Raw, Struct

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.reading import is_given, kind_of, read_piece, unsupported

_ONLY_FUNCTIONS = "this server has no tools of its own, only 'function' tools of the client"
Mode = Literal["none", "auto", "required"]
_MODES: tuple[Mode, ...] = ("none", "auto", "required")


class FunctionTool(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    name: str
    description: str | None = None
    parameters: dict[str, Raw] | None = None
    strict: bool | None = None


class NamedTool(Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    name: str


class AllowedTools(Struct, frozen=True, kw_only=True, tag_field="type", tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: tuple[NamedTool, ...]


ToolChoice = Mode | NamedTool | AllowedTools


class PlainText(Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Whatever the model says."""


class JSONObject(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JSONSchema(Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    name: str
    schema: dict[str, Raw]
    description: str | None = None
    strict: bool | None = None


Format = PlainText | JSONObject | JSONSchema


class TextConfig(Struct, frozen=True, kw_only=True):
    format: Format
    verbosity: Literal["low", "medium", "high"] | None = None


_tool = msgspec.json.Decoder(FunctionTool)
_named = msgspec.json.Decoder(NamedTool)
_allowed = msgspec.json.Decoder(AllowedTools)
_mode_or_piece = msgspec.json.Decoder(str | dict[str, Raw])
_schema = msgspec.json.Decoder(JSONSchema)


def read_tool(piece: Raw, path: str) -> FunctionTool:
    """Raises `InvalidRequest` for a tool of another kind, by its name."""
    kind = kind_of(piece, path)
    if kind != "function":
        raise unsupported(f"{path}.type", kind or "", _ONLY_FUNCTIONS)
    return read_piece(piece, _tool, path)


def read_choice(piece: Raw) -> ToolChoice:
    """Raises `InvalidRequest` for what is no choice among functions."""
    if not is_given(piece):
        return "auto"
    if isinstance(read_piece(piece, _mode_or_piece, "tool_choice"), str):
        word = msgspec.json.decode(piece, type=str)
        for mode in _MODES:
            if word == mode:
                return mode
        raise unsupported("tool_choice", word, f"say one of {', '.join(_MODES)}")
    kind = kind_of(piece, "tool_choice")
    if kind == "function":
        return read_piece(piece, _named, "tool_choice")
    if kind == "allowed_tools":
        return read_piece(piece, _allowed, "tool_choice")
    raise unsupported("tool_choice.type", kind or "", _ONLY_FUNCTIONS)


def check_choice(choice: ToolChoice, tools: tuple[FunctionTool, ...]) -> None:
    """Raise `InvalidRequest` when a tool is chosen that is not there."""
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice: there are no tools", param="tool_choice")
        return
    wanted = (choice,) if isinstance(choice, NamedTool) else choice.tools
    names = {tool.name for tool in tools}
    for tool in wanted:
        if tool.name not in names:
            shown = tool.name[:100]
            raise InvalidRequest(f"tool_choice: no tool is named {shown!r}", param="tool_choice")


def read_format(piece: Raw) -> Format:
    """Raises `InvalidRequest` for what is no format."""
    if not is_given(piece):
        return PlainText()
    kind = kind_of(piece, "text.format")
    if kind == "text":
        return PlainText()
    if kind == "json_object":
        return JSONObject()
    if kind == "json_schema":
        return read_piece(piece, _schema, "text.format")
    raise unsupported("text.format.type", kind or "", "say text, json_object or json_schema")
