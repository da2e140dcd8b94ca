"""The settings' tree as a flat table: one `Field` per dotted key, read off the structs."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import textwrap
import types
import typing

import msgspec

from serverlessllm.core.units import GIB, KIB, MIB, TIB, parse_duration_s, parse_size_bytes

_SECRET = re.compile(r"(secret|password|credential|token)s?$|(api|access|account|secret)_key")
_UNIT = re.compile(r"_(bytes_s|bytes_per_s|bytes|s)(?:_max|_min)?$")
HIDDEN = "(hidden)"
AUTO = "auto"
"""How a file spells None: the value is derived from the machine."""


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One setting."""

    key: str
    """Dotted path, such as `loader.dram_budget_bytes`."""
    type: object
    """Its annotation, resolved."""
    default: object
    doc: str
    """The docstring under the field; a sentence or two."""

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def section(self) -> str:
        """All but the last part of the key; empty at the top."""
        return self.key.rpartition(".")[0]

    @property
    def optional(self) -> bool:
        """Whether `auto` is a value of it."""
        return type(None) in _members(self.type)

    @property
    def secret(self) -> bool:
        """Whether its value must not be shown."""
        return self.type is not bool and is_secret(self.name)

    @property
    def environment(self) -> str:
        """The variable that sets it."""
        return "SLLM_" + self.key.replace(".", "__").upper()

    @property
    def expected(self) -> str:
        """What a value looks like, for an error message."""
        kind = next((t for t in _members(self.type) if t is not type(None)), str)
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            text = "one of " + ", ".join(str(member.value) for member in kind)
        else:
            kind = getattr(kind, "__supertype__", kind)  # what a NewType is made of
            text = _EXPECTED.get(
                _unit(self.name) or typing.get_origin(kind) or kind, "a value of its type"
            )
        return f'{text}, or "{AUTO}"' if self.optional else text

    def convert(self, value: object) -> object:
        """A value as a file, a variable or a flag spells it → the field's own type.

        Raises:
            ValueError: it is not one; the message says why.
        """
        if value == AUTO and self.optional:
            return None
        if isinstance(value, str):
            value = self._from_text(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            unit = _unit(self.name)
            if unit == "size":
                value = parse_size_bytes(int(value))
            elif unit == "duration":
                value = parse_duration_s(value)
        return msgspec.convert(value, self.type, strict=not isinstance(value, str))

    def _from_text(self, text: str) -> object:
        unit = _unit(self.name)
        if unit == "size":
            return parse_size_bytes(text)
        if unit == "duration":
            return parse_duration_s(text)
        if any((typing.get_origin(t) or t) in _CONTAINERS for t in _members(self.type)):
            if text.lstrip()[:1] in {"[", "{"}:
                return msgspec.json.decode(text.encode())
            return [part.strip() for part in text.split(",") if part.strip()]
        return text


def is_secret(name: str) -> bool:
    """Whether what carries this name must not be shown."""
    return _SECRET.search(name.lower()) is not None


_CONTAINERS = {tuple, list, dict, set, frozenset}
_EXPECTED: dict[object, str] = {
    "size": "a size such as 512MiB or 8GiB",
    "duration": "a duration such as 30s, 5m or 1h30m",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    dict: "a table",
}


def _unit(name: str) -> str | None:
    """What the name's unit says the number is: `size`, `duration` or neither."""
    match = _UNIT.search(name)
    if match is None:
        return None
    return "duration" if match[1] == "s" else "size"


def _members(annotation: object) -> tuple[object, ...]:
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        return typing.get_args(annotation)
    return (annotation,)


def fields(settings: type[msgspec.Struct], prefix: str = "") -> dict[str, Field]:
    """Every setting under `settings`, by key, sections after the section's own fields."""
    here: dict[str, Field] = {}
    below: dict[str, Field] = {}
    docs = _docs(settings)
    for info in msgspec.structs.fields(settings):
        key = prefix + info.name
        if isinstance(info.type, type) and issubclass(info.type, msgspec.Struct):
            below |= fields(info.type, key + ".")
            continue
        default = info.default
        if default is msgspec.NODEFAULT and info.default_factory is not msgspec.NODEFAULT:
            default = info.default_factory()
        here[key] = Field(key=key, type=info.type, default=default, doc=docs.get(info.name, ""))
    return here | below


def sections(settings: type[msgspec.Struct], prefix: str = "") -> dict[str, type[msgspec.Struct]]:
    """Every section, by its dotted name; the root is the empty name."""
    found = {prefix.rstrip("."): settings}
    for info in msgspec.structs.fields(settings):
        if isinstance(info.type, type) and issubclass(info.type, msgspec.Struct):
            found |= sections(info.type, f"{prefix}{info.name}.")
    return found


def _docs(settings: type[msgspec.Struct]) -> dict[str, str]:
    """The string literal after each field: the one place where a setting is explained."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            docs[field.target.id] = " ".join(after.value.value.split())
    return docs


def section_doc(settings: type[msgspec.Struct]) -> str:
    """The first paragraph of a section's docstring, on one line."""
    return " ".join(inspect.cleandoc(settings.__doc__ or "").split("\n\n")[0].split())


def spell(name: str, number: float) -> str:
    """A number as a file would say it, in the unit that its name carries: `"16MiB"`, `"5m"`."""
    if _unit(name) == "size" and number >= KIB:
        for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
            if number % size == 0:
                return f'"{number / size:.0f}{unit}"'
    if _unit(name) == "duration":
        for unit, seconds in (("d", 86400), ("h", 3600), ("m", 60)):
            if number >= seconds and number % seconds == 0:
                return f'"{number / seconds:.0f}{unit}"'
        if 0 < number < 1:
            return f'"{number * 1000:g}ms"'
        if number > 0:
            return f'"{number:g}s"'
    return f"{number:g}" if number % 1 else f"{number:.0f}"
