"""Schemas of structs, described by their docstrings and bounded by the limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import msgspec
from msgspec import inspect

from serverlessllm.openai.document.docstrings import field_docs
from serverlessllm.openai.document.limited import Bound, bounds
from serverlessllm.openai.settings import RequestLimits

_Json: TypeAlias = dict[str, Any]
_REFERENCE = "#/components/schemas/"
_KEYWORDS = (
    ("integer", "maximum", "maximum"),
    ("number", "maximum", "maximum"),
    ("array", "maxItems", "items_max"),
    ("string", "maxLength", "chars_max"),
    ("object", "maxProperties", "properties_max"),
)


class Components:
    """The schemas of everything that `asked` and `answered` are made of.

    What we answer always has all of its fields; what we are asked may leave out those that have a
    default.
    """

    def __init__(
        self, *, asked: Sequence[Any], answered: Sequence[Any], limits: RequestLimits
    ) -> None:
        self._types = [*asked, *answered]
        schemas, found = msgspec.json.schema_components(
            self._types, ref_template=_REFERENCE + "{name}"
        )
        requests = set(_structs(asked))
        for kind in _structs(self._types):
            schema = found.get(_full_name(kind)) or found[kind.__name__]
            _describe(schema, kind)
            for field, bound in bounds(kind, limits).items():
                _bound(schema["properties"][field], bound)
            if kind not in requests:
                schema["required"] = _always(schema, kind)
        self.schemas: dict[str, _Json]
        """By name."""
        self._schemas, self.schemas = _renamed(list(schemas), found)

    def schema(self, kind: Any) -> _Json:
        """The schema of one of the types: a struct's is a reference."""
        return self._schemas[next(n for n, one in enumerate(self._types) if one is kind)]


def _structs(kinds: Sequence[Any]) -> list[type[msgspec.Struct]]:
    """Every struct that the types are made of, each once."""
    found: dict[type[msgspec.Struct], None] = {}
    waiting = list(inspect.multi_type_info(kinds))
    while waiting:
        info = waiting.pop()
        if isinstance(info, inspect.StructType):
            if info.cls in found:
                continue
            found[info.cls] = None
        waiting += _inside(info)
    return list(found)


def _inside(info: inspect.Type) -> Iterator[inspect.Type]:
    """The types that a type is made of."""
    if isinstance(info, inspect.StructType):
        yield from (field.type for field in info.fields)
    elif isinstance(info, inspect.Metadata):
        yield info.type
    elif isinstance(info, inspect.CollectionType):
        yield info.item_type
    elif isinstance(info, inspect.TupleType):
        yield from info.item_types
    elif isinstance(info, inspect.DictType):
        yield info.value_type
    elif isinstance(info, inspect.UnionType):
        yield from info.types


def _describe(schema: _Json, kind: type[msgspec.Struct]) -> None:
    """Say what each field is; leave out that what may be missing is then null."""
    schema["description"] = " ".join((kind.__doc__ or "").split())
    properties = schema["properties"]
    for field, text in field_docs(kind).items():
        if field in properties:
            properties[field]["description"] = text
    for of_field in properties.values():
        if "default" in of_field and of_field["default"] is None:
            del of_field["default"]


def _bound(schema: _Json, bound: Bound) -> None:
    """Put a bound on what of a field's schema it counts for."""
    for kind, keyword, name in _KEYWORDS:
        value = getattr(bound, name)
        if value is not None and schema.get("type") == kind:
            schema[keyword] = min(value, schema.get(keyword, value))
    for one in schema.get("anyOf", ()):
        _bound(one, bound)
    if bound.chars_max is not None and "items" in schema:
        _bound(schema["items"], Bound(chars_max=bound.chars_max))


def _always(schema: _Json, kind: type[msgspec.Struct]) -> list[str]:
    """The fields that an encoded struct cannot lack."""
    if kind.__struct_config__.omit_defaults:
        return [name for name in schema["required"] if name in schema["properties"]]
    fields = msgspec.structs.fields(kind)
    unset = {field.encode_name for field in fields if field.default is msgspec.UNSET}
    return [name for name in schema["properties"] if name not in unset]


def _full_name(kind: type) -> str:
    """How msgspec calls a class when another one has the same name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _renamed(
    schemas: list[_Json], components: dict[str, _Json]
) -> tuple[list[_Json], dict[str, _Json]]:
    """The same under names that a reader can bear: of two the package tells which is which."""
    text = msgspec.json.encode([schemas, components]).decode()
    names = {old: _short(old) for old in components}
    for old, new in names.items():
        text = text.replace(f'"{_REFERENCE}{old}"', f'"{_REFERENCE}{new}"')
    schemas, components = msgspec.json.decode(text)
    return schemas, {names[old]: components[old] for old in sorted(components, key=_short)}


def _short(name: str) -> str:
    """`serverlessllm.openai.responses.tools.FunctionTool` → `ResponsesFunctionTool`."""
    *path, last = name.split(".")
    last = last.lstrip("_")
    return f"{path[-2].title()}{last}" if len(path) > 1 else last
