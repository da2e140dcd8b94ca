"""What a chat may call."""

from __future__ import annotations

import msgspec
import pytest

from serverlessllm.backends.tools import ToolFields, calls_schema, toolset_of
from serverlessllm.core.errors import InvalidRequest


def fields(body: bytes) -> ToolFields:
    return msgspec.json.decode(body, type=ToolFields)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"functions":[{"name":"f"}]}', "functions"),
        (b'{"function_call":"auto"}', "function_call"),
        (b'{"function_call":{"name":"f"}}', "function_call"),
    ],
)
def test_the_deprecated_fields_are_refused_by_name(body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest, match="use tools") as refused:
        toolset_of(fields(body))
    assert refused.value.param == param


def test_null_is_as_good_as_nothing() -> None:
    body = b'{"tools":null,"tool_choice":null,"functions":null,"function_call":null}'
    assert toolset_of(fields(body)) == toolset_of(fields(b"{}"))


@pytest.mark.parametrize("parameters", [b"", b',"parameters":null'])
def test_a_function_without_parameters_is_called_without_any(parameters: bytes) -> None:
    tool = b'{"type":"function","function":{"name":"f"%b}}' % parameters
    toolset = toolset_of(fields(b'{"tools":[%b],"tool_choice":"required"}' % tool))
    schema = calls_schema(toolset.tools, several=False)
    assert schema["$defs"]["tool0"]["properties"] == {}
    assert schema["$defs"]["tool0"]["additionalProperties"] is False
