"""Tools that a model may call, which of them it shall, and the form of its answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Raw

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request.checks import items_at_most
from serverlessllm.openai.request.errors import InvalidValue, MissingParameter, ObjectTooLarge
from serverlessllm.openai.request.patterns import NAME
from serverlessllm.openai.settings import RequestLimits

Name: TypeAlias = Annotated[str, Meta(pattern=NAME)]
Schema: TypeAlias = dict[str, Raw]
"""A JSON Schema: an object; the backend reads what is in it."""


class FunctionDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    """When and how to call it."""
    parameters: Schema | None = None
    """JSON Schema of its arguments; none: it takes none."""
    strict: bool | None = None
    """Whether arguments must follow the schema exactly."""


class FunctionTool(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    """A tool that takes JSON."""

    function: FunctionDefinition


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Any text."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar that a custom tool's input follows."""

    definition: str
    syntax: Literal["lark", "regex"]


class GrammarFormat(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="grammar"):
    """Text that a grammar describes."""

    grammar: Grammar


class CustomDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that takes text."""

    name: Name
    description: str | None = None
    format: TextFormat | GrammarFormat | None = None


class CustomTool(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="custom"):
    """A tool that takes text."""

    custom: CustomDefinition


Tool: TypeAlias = FunctionTool | CustomTool


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """A tool by its name."""

    name: str


class FunctionChoice(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function"):
    """Call this function."""

    function: Named


class CustomChoice(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="custom"):
    """Call this custom tool."""

    custom: Named


class AllowedTools(msgspec.Struct, frozen=True, kw_only=True):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    """Whether one of them may be called, or must."""
    tools: list[FunctionChoice | CustomChoice]


class AllowedChoice(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="allowed_tools"
):
    """Only these of the tools."""

    allowed_tools: AllowedTools


ToolChoice: TypeAlias = (
    Literal["none", "auto", "required"] | FunctionChoice | CustomChoice | AllowedChoice
)


class AnswerSchema(msgspec.Struct, frozen=True, kw_only=True):
    """The form of a structured answer."""

    name: Name
    description: str | None = None
    schema: Schema | None = None
    """JSON Schema of the answer."""
    strict: bool | None = None


class TextAnswer(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Any text."""


class JSONAnswer(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class SchemaAnswer(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    """JSON that follows a schema."""

    json_schema: AnswerSchema


ResponseFormat: TypeAlias = TextAnswer | JSONAnswer | SchemaAnswer


def check_tools(tools: list[Tool], limits: RequestLimits) -> None:
    """Raise for too many tools, two of one name, or a schema that is too long."""
    items_at_most("tools", len(tools), limits.tools_max, "tools")
    names = set()
    for place, tool in enumerate(tools):
        if isinstance(tool, FunctionTool):
            names.add(("function", tool.function.name))
            if tool.function.parameters is not None:
                param = f"tools[{place}].function.parameters"
                check_schema(param, tool.function.parameters, limits)
        else:
            names.add(("custom", tool.custom.name))
    if len(names) < len(tools):
        raise InvalidValue("tools: two of them have the same name", param="tools")


def check_functions(functions: list[FunctionDefinition], limits: RequestLimits) -> None:
    """`check_tools` of the deprecated `functions`."""
    items_at_most("functions", len(functions), limits.tools_max, "functions")
    for place, function in enumerate(functions):
        if function.parameters is not None:
            check_schema(f"functions[{place}].parameters", function.parameters, limits)
    if len({function.name for function in functions}) < len(functions):
        raise InvalidValue("functions: two of them have the same name", param="functions")


def check_schema(param: str, schema: Schema, limits: RequestLimits) -> None:
    """Raise for a schema that is longer than a backend should have to compile."""
    size = sum(len(key) + memoryview(value).nbytes for key, value in schema.items())
    if size > limits.schema_bytes_max:
        raise ObjectTooLarge(f"{param}: at most {limits.schema_bytes_max} bytes", param=param)


def check_tool_choice(choice: ToolChoice, tools: list[Tool] | None) -> None:
    """Raise for a choice among tools that are not there."""
    if choice == "none" or choice == "auto":  # not every choice has a hash
        return
    if not tools:
        raise MissingParameter("tools: needed by tool_choice", param="tools")
    if isinstance(choice, AllowedChoice):
        where = "tool_choice.allowed_tools.tools"
        for place, one in enumerate(choice.allowed_tools.tools):
            _check_chosen(f"{where}[{place}]", one, tools)
    elif not isinstance(choice, str):
        _check_chosen("tool_choice", choice, tools)


def _check_chosen(where: str, choice: FunctionChoice | CustomChoice, tools: list[Tool]) -> None:
    if isinstance(choice, FunctionChoice):
        names = (tool.function.name for tool in tools if isinstance(tool, FunctionTool))
        check_named(f"{where}.function.name", choice.function.name, names)
    else:
        names = (tool.custom.name for tool in tools if isinstance(tool, CustomTool))
        check_named(f"{where}.custom.name", choice.custom.name, names)


def check_named(param: str, name: str, names: Iterable[str]) -> None:
    """Raise unless the name is one of `names`."""
    if name not in names:
        raise InvalidValue(f"{param}: the request has no tool of that name", param=param)


def check_needs_tools(param: str, tools: list[Tool] | None) -> None:
    """Raise for a field that says how tools are called when there is none."""
    if not tools:
        raise InvalidRequest(f"{param}: only together with tools", param=param)
