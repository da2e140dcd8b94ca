"""JSON Schema as a grammar in llama.cpp's own notation (GBNF).

Its server makes one itself, by a library that knows only vocabularies whose tokens are spelled as
they read; for the others (a SentencePiece model's first token loses its space) this is the way.
What is not known here is refused by name, never left out: the answer would not hold the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from serverlessllm.core.errors import InvalidRequest

DEPTH_MAX = 64
"""Of schemas within schemas."""
_REPEATS_MAX = 1024
"""Of a bound such as `maxItems`; llama.cpp's parser unrolls them."""
_NOTES = frozenset(
    {"title", "description", "default", "examples", "example", "$schema", "$id", "$comment"}
    | {"$defs", "definitions", "format", "deprecated", "readOnly", "writeOnly", "strict"}
    | {"nullable"}
)
"""Keywords that say nothing of the form, or nothing that must hold."""
_KNOWN = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "prefixItems", "$ref"}
    | {"minItems", "maxItems", "minLength", "maxLength", "minimum", "enum", "const"}
    | {"anyOf", "oneOf", "allOf"}
)
_BASE = {
    "s": '" "?',
    "string": r'"\"" char* "\""',
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4})',
    "integer": '"-"? natural',
    "natural": '"0" | [1-9] [0-9]{0,15}',
    "number": 'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "pair": 'string ":" s value',
    "object": '"{" s (pair ("," s pair)*)? s "}"',
    "array": '"[" s (value ("," s value)*)? s "]"',
}

Schema = Mapping[str, Any]


def grammar(schema: Schema) -> str:
    """The grammar of a JSON text that holds `schema`; its rule `root` is where it begins.

    Raises:
        InvalidRequest: the schema says what no rule is known for.
    """
    made = _Rules(schema)
    try:
        made.rules["root"] = made.expression(schema, 0)
    except (TypeError, AttributeError, ValueError):  # a list where an object must be, and the like
        raise _refusal("it is none") from None
    return "\n".join(f"{name} ::= {body}" for name, body in made.rules.items())


class _Rules:
    """The rules so far."""

    def __init__(self, root: Schema) -> None:
        self.rules = dict(_BASE)
        self._root = root
        self._references: dict[str, str] = {}
        self._makers: dict[str, Callable[[Schema, int], str]] = {
            "$ref": lambda schema, depth: self._reference(schema["$ref"], depth),
            "const": lambda schema, _: _literal(schema["const"]),
            "enum": lambda schema, _: _either([_literal(value) for value in schema["enum"]]),
            "anyOf": lambda schema, depth: self._any(schema["anyOf"], depth),
            "oneOf": lambda schema, depth: self._any(schema["oneOf"], depth),
            "allOf": lambda schema, depth: self.expression(_merged(schema), depth + 1),
        }

    def expression(self, schema: object, depth: int) -> str:
        """What matches a text that holds `schema`."""
        if depth > DEPTH_MAX:
            raise _refusal("it is nested too deep")
        if schema is True:
            return "value"
        if not isinstance(schema, Mapping):
            raise _refusal("a schema must be an object")
        unknown = sorted(schema.keys() - _NOTES - _KNOWN)
        if unknown:
            raise _refusal(f"this model's engine does not know {unknown[0]!r}")
        for key, make in self._makers.items():
            if key in schema:
                return make(schema, depth)
        kind = schema.get("type", _implied(schema))
        kinds = kind if isinstance(kind, list) else [kind]
        return _either([self._typed(one, schema, depth) for one in kinds])

    def _typed(self, kind: object, schema: Schema, depth: int) -> str:
        makers: dict[object, Callable[[Schema, int], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._number,
            "number": self._number,
        }
        if kind in makers:
            return makers[kind]({**schema, "type": kind}, depth)
        if kind in {"boolean", "null"}:
            return str(kind)
        if kind is None:
            return "value"
        raise _refusal(f"there is no type {str(kind)[:40]!r}")

    def _any(self, schemas: Sequence[object], depth: int) -> str:
        return _either([self.expression(one, depth + 1) for one in schemas])

    def _add(self, body: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules[name] = body
        return name

    def _reference(self, pointer: object, depth: int) -> str:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise _refusal("a $ref must begin with '#'")
        if pointer not in self._references:
            found: Any = self._root
            for escaped in pointer[1:].split("/")[1:]:
                part = escaped.replace("~1", "/").replace("~0", "~")
                try:
                    found = found[int(part)] if isinstance(found, list) else found[part]
                except (LookupError, TypeError, ValueError):
                    raise _refusal(f"$ref {pointer[:100]!r} names nothing") from None
            name = self._references[pointer] = self._add("")
            self.rules[name] = self.expression(found, depth + 1)
        return self._references[pointer]

    def _object(self, schema: Schema, depth: int) -> str:
        """Properties in their order; those that need not be there may be left out."""
        properties: dict[str, object] = dict(schema.get("properties") or {})
        required = schema.get("required") or ()
        properties |= {name: True for name in required if name not in properties}
        others = schema.get("additionalProperties", not properties)
        after = ""
        alone = ""
        if others is not False and (others is True or isinstance(others, Mapping)):
            pair = self._add(f'string ":" s {self.expression(others, depth + 1)}')
            after = self._add(f'("," s {pair})*')
            alone = self._add(f"({pair} {after})?")
        for name in reversed(properties):
            value = self.expression(properties[name], depth + 1)
            pair = self._add(f'{_literal(name)} ":" s {value}')
            if name in required:
                alone = self._add(f"{pair} {after}")
                after = self._add(f'"," s {pair} {after}')
            else:
                alone = self._add(f"{pair} {after} | {alone or _EMPTY}")
                after = self._add(f'("," s {pair})? {after}')
        return self._add(f'"{{" s {alone} s "}}"')

    def _array(self, schema: Schema, depth: int) -> str:
        first = [self.expression(one, depth + 1) for one in schema.get("prefixItems") or ()]
        least = max(_bound(schema, "minItems") or 0, len(first))
        most = _bound(schema, "maxItems")
        items = schema.get("items", not first)
        joined = ' "," s '.join(first)
        if items is False:
            return f'"[" s {joined} s "]"'
        item = self._add(self.expression(items, depth + 1))
        if first:
            rest = f'("," s {item}){_times(least - len(first), _less(most, len(first)))}'
            return self._add(f'"[" s {joined} {rest} s "]"')
        if most == 0:
            return self._add('"[" s "]"')
        several = f'{item} ("," s {item}){_times(max(0, least - 1), _less(most, 1))}'
        return self._add(f'"[" s {several if least else f"({several})?"} s "]"')

    def _string(self, schema: Schema, depth: int) -> str:
        del depth
        least, most = _bound(schema, "minLength"), _bound(schema, "maxLength")
        if least is None and most is None:
            return "string"
        return self._add(rf'"\"" char{_times(least or 0, most)} "\""')

    def _number(self, schema: Schema, depth: int) -> str:
        del depth
        kind = str(schema["type"])
        if "minimum" not in schema:
            return kind
        if schema["minimum"] != 0:
            raise _refusal("this model's engine knows no 'minimum' but 0")
        return "natural" if kind == "integer" else self._add(_BASE["number"].replace(
            "integer", "natural", 1
        ))  # fmt: skip


_EMPTY = '""'


def _either(choices: Sequence[str]) -> str:
    if not choices:
        raise _refusal("a choice of nothing")
    return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def _literal(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _times(least: int, most: int | None) -> str:
    if most is None:
        return f"{{{least},}}" if least else "*"
    if most < least:
        raise _refusal("a maximum below its minimum")
    return f"{{{least},{most}}}"


def _less(bound: int | None, by: int) -> int | None:
    return None if bound is None else bound - by


def _bound(schema: Schema, key: str) -> int | None:
    value = schema.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value <= _REPEATS_MAX:
        raise _refusal(f"{key!r} must be from 0 to {_REPEATS_MAX} for this model's engine")
    return value


def _implied(schema: Schema) -> str | None:
    """The type of a schema that does not say it."""
    if "properties" in schema or "required" in schema or "additionalProperties" in schema:
        return "object"
    return "array" if "items" in schema or "prefixItems" in schema else None


def _merged(schema: Schema) -> Schema:
    """`allOf` as one schema: of objects the properties are joined, the rest must not collide."""
    merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
    for part in schema["allOf"]:
        if not isinstance(part, Mapping):
            raise _refusal("a schema must be an object")
        for key, value in part.items():
            if key in _NOTES or key not in merged or merged[key] == value:
                merged[key] = value
            elif key == "properties":
                merged[key] = {**merged[key], **value}
            elif key == "required":
                merged[key] = [*merged[key], *value]
            else:
                raise _refusal(f"'allOf' says {key!r} twice")
    return merged


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(f"response_format: the JSON schema: {why}", param="response_format")
