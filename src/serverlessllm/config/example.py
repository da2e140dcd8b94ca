"""The example configuration file, written from the settings themselves: it cannot lag behind."""

from __future__ import annotations

import textwrap

import msgspec

from serverlessllm.config import schema
from serverlessllm.config.settings import Settings

_HEAD = """\
# ServerlessLLM: every setting, explained, at its default. Copy it to ./serverlessllm.toml or to
# ~/.config/serverlessllm/serverlessllm.toml and uncomment what you change. Sizes are written as
# "8GiB", durations as "5m"; "auto" asks the machine. `sllm config check` tells what is in force.
# The environment says the same: SLLM_LOADER__DRAM_BUDGET_BYTES=8GiB sets loader.dram_budget_bytes.
"""


def render() -> str:
    """The whole file: `sllm config example`, kept as `serverlessllm.example.toml`."""
    lines = [_HEAD]
    kinds = schema.sections(Settings)
    section = ""
    for field in schema.fields(Settings).values():
        if field.section != section:
            section = field.section
            lines += [f"[{section}]", *_comment(schema.section_doc(kinds[section])), ""]
        lines += [
            *_comment(field.doc.replace("None:", f"{schema.AUTO}:")),
            f"# {field.name} = {_value(field)}",
            "",
        ]
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ")


def _value(field: schema.Field) -> str:
    """The default as TOML, in the unit that people write."""
    value = field.default
    if value is None:
        return f'"{schema.AUTO}"'
    if isinstance(value, int | float) and not isinstance(value, bool):
        return schema.spell(field.name, value)
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{k}" = {_plain(v)}' for k, v in value.items()) + " }"
    return _plain(value)


def _plain(value: object) -> str:
    """Text, numbers, booleans and lists: TOML spells them as JSON does."""
    return msgspec.json.encode(value).decode()
