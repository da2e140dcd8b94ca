"""The tools of a chat: which its answer may call, and how a model is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import msgspec
from msgspec import Raw

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request.tools import (
    AllowedChoice,
    CustomChoice,
    CustomTool,
    FunctionChoice,
    FunctionTool,
    Schema,
    Tool,
    ToolChoice,
)

NULL = Raw(b"null")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
CALLS_MAX = 16
"""Calls of one answer that is made to call."""

PROLOGUE = r"""{%- set sllm = namespace(messages=[], told=not tools) -%}
{%- for message in messages -%}
{%- set text = message.content if message.content else '' -%}
{%- set role = message.role -%}
{%- if role == 'tool' -%}
{%- set role = 'user' -%}
{%- set text = '<tool_response>\n' ~ text ~ '\n</tool_response>' -%}
{%- endif -%}
{%- if not sllm.told -%}
{%- set sllm.told = true -%}
{%- set told = namespace(tools='') -%}
{%- for tool in tools -%}
{%- set told.tools = told.tools ~ '\n' ~ (tool | tojson) -%}
{%- endfor -%}
{%- set text = 'You may call these functions:\n<tools>' ~ told.tools ~ '\n</tools>\nTo call one,'
 ~ ' answer with its name and arguments as JSON within tags:\n<tool_call>\n{"name": <name>,'
 ~ ' "arguments": <arguments>}\n</tool_call>\n\n' ~ text -%}
{%- endif -%}
{%- if message.tool_calls -%}
{%- set made = namespace(text=text) -%}
{%- for call in message.tool_calls -%}
{%- set given = call.function.arguments -%}
{%- set made.text = made.text ~ ('\n' if made.text else '') ~ '<tool_call>\n{"name": '
 ~ (call.function.name | tojson) ~ ', "arguments": '
 ~ (given if given is string else (given | tojson)) ~ '}\n</tool_call>' -%}
{%- endfor -%}
{%- set text = made.text -%}
{%- endif -%}
{%- set sllm.messages = sllm.messages + [{'role': role, 'content': text}] -%}
{%- endfor -%}
{%- set messages = sllm.messages -%}
"""
"""Goes before a chat template that knows no tools (Jinja): writes tools, calls and their results
into the messages' text, in the form that Hermes and Qwen are trained on."""


def with_tools(template: str) -> str:
    """A chat template that knows tools: the model's own if it does."""
    return template if "tools" in template else PROLOGUE + template


class ToolFields(msgspec.Struct, frozen=True, kw_only=True):
    """Of a chat's body."""

    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Raw = NULL
    function_call: Raw = NULL


class Toolset(msgspec.Struct, frozen=True, kw_only=True):
    """What a chat's answer may call."""

    tools: tuple[FunctionTool, ...] = ()
    forced: bool = False
    """Whether the answer has to be a call."""
    several: bool = False
    """Whether a forced answer may be more than one."""

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.tools]

    def told(self) -> list[object]:
        """As a template writes them: without what is not said."""
        told: list[object] = []
        for tool in self.tools:
            fields = msgspec.json.decode(msgspec.json.encode(tool.function), type=dict[str, object])
            said = {name: value for name, value in fields.items() if value is not None}
            told.append({"type": "function", "function": said})
        return told


def toolset_of(fields: ToolFields) -> Toolset:
    """The tools that the request's choice leaves.

    Raises:
        InvalidRequest: it wants what only OpenAI's own models have, or names no tool.
    """
    for field in ("functions", "function_call"):
        if bytes(getattr(fields, field)) != bytes(NULL):
            raise InvalidRequest(f"{field}: use tools and tool_choice instead", param=field)
    tools = []
    for place, tool in enumerate(fields.tools or ()):
        if isinstance(tool, CustomTool):
            param = f"tools[{place}].type"
            raise InvalidRequest(f"{param}: this model's engine calls functions only", param=param)
        tools.append(tool)
    choice, several = fields.tool_choice, fields.parallel_tool_calls is True
    if choice == "none":
        return Toolset()
    if choice is None or choice == "auto":
        return Toolset(tools=tuple(tools))
    forced = choice == "required"
    if isinstance(choice, AllowedChoice):
        names = {one.function.name for one in choice.allowed_tools.tools if _is_function(one)}
        forced = choice.allowed_tools.mode == "required"
        tools = [tool for tool in tools if tool.function.name in names]
    elif isinstance(choice, FunctionChoice):
        forced, several = True, False
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    if forced and not tools:
        raise InvalidRequest("tool_choice: it names none of the tools", param="tool_choice")
    return Toolset(tools=tuple(tools), forced=forced, several=several)


def _is_function(choice: FunctionChoice | CustomChoice) -> TypeGuard[FunctionChoice]:
    return isinstance(choice, FunctionChoice)


def calls_schema(tools: Sequence[FunctionTool], *, several: bool) -> dict[str, Any]:
    """JSON schema of an answer that is one call of one of the tools, or a list of them."""
    definitions: dict[str, object] = {}
    kinds: list[dict[str, object]] = []
    for number, tool in enumerate(tools):
        key = f"tool{number}"
        given = tool.function.parameters
        parameters = _NO_PARAMETERS if given is None else _plain(given)
        definitions[key] = _moved(parameters, f"#/$defs/{key}")
        kinds.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "arguments": {"$ref": f"#/$defs/{key}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    call: dict[str, object] = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if several:
        call = {"type": "array", "items": call, "minItems": 1, "maxItems": CALLS_MAX}
    return call | {"$defs": definitions}


def _plain(schema: Schema) -> dict[str, object]:
    """A schema, all of it decoded."""
    return msgspec.json.decode(msgspec.json.encode(schema), type=dict[str, object])


def _moved(value: object, root: str) -> object:
    """A schema that is part of another now: its references, which were from its own root."""
    if isinstance(value, Mapping):
        return {
            key: root + item[1:]
            if key == "$ref" and isinstance(item, str) and item.startswith("#")
            else _moved(item, root)
            for key, item in value.items()
        }
    return [_moved(item, root) for item in value] if isinstance(value, list) else value
