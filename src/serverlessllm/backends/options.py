"""`ModelSpec.options`: text from an operator, made into a backend's own checked struct."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from serverlessllm.backends.base import Refusal

Options = TypeVar("Options", bound=msgspec.Struct)


def parse_options(options: dict[str, str], type_: type[Options]) -> Options | Refusal:
    """Convert each text to its field's type (`"4"` → 4, `"true"` → True) within its limits."""
    try:
        return msgspec.convert(options, type_, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(type_))
        return Refusal(reason=f"options: {error}; known options: {known}")
