"""Schemas as grammars; that llama.cpp holds answers to them is tried in the integration tests."""

from __future__ import annotations

import re
from typing import Any

import pytest

from serverlessllm.backends.gbnf import DEPTH_MAX, grammar
from serverlessllm.core.errors import InvalidRequest


def rules(schema: dict[str, Any]) -> dict[str, str]:
    lines = grammar(schema).splitlines()
    return {name: body for name, _, body in (line.partition(" ::= ") for line in lines)}


def test_every_rule_that_is_named_is_there() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1, "maxItems": 4},
            "b": {"type": ["integer", "null"], "minimum": 0},
            "c": {"anyOf": [{"const": "x"}, {"enum": [1, None, "y"]}]},
            "d": {"allOf": [{"type": "string"}, {"maxLength": 3}]},
            "e": {"prefixItems": [{"type": "boolean"}], "items": True},
        },
        "required": ["a", "z"],
        "additionalProperties": {"type": "number"},
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}},
    }
    made = rules(schema)
    for body in made.values():
        bare = re.sub(r'"(?:[^"\\]|\\.)*"|\[(?:[^]\\]|\\.)*\]|\{[\d,]+\}', " ", body)
        assert set(re.findall(r"[a-z][a-z0-9]*", bare)) <= made.keys(), body


@pytest.mark.parametrize(
    ("schema", "root"),
    [
        ({}, "value"),
        ({"type": "boolean"}, "boolean"),
        ({"const": 'a"b'}, '"\\"a\\\\\\"b\\""'),
        ({"enum": [1, True]}, '("1" | "true")'),
        ({"type": "integer"}, "integer"),
        ({"type": "integer", "minimum": 0, "description": "a count"}, "natural"),
    ],
)
def test_what_simple_schemas_become(schema: dict[str, Any], root: str) -> None:
    assert rules(schema)["root"] == root


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "no such type"},
        {"type": "string", "pattern": "a+"},
        {"type": "integer", "minimum": 3},
        {"type": "array", "maxItems": 10**9},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"enum": []},
        {"enum": 5},
        {"properties": [5]},
        {"anyOf": [5]},
        {"$ref": "#/$defs/none"},
        {"$ref": "http://other"},
        {"allOf": [{"type": "string"}, {"type": "null"}]},
    ],
)
def test_what_it_cannot_say_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        grammar(schema)
    assert refusal.value.param == "response_format"


def test_a_schema_may_not_be_endlessly_deep() -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(DEPTH_MAX + 1):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidRequest, match="nested too deep"):
        grammar(deep)
