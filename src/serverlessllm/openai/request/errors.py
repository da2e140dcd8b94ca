"""Why a field is refused: the codes that OpenAI's own API gives."""

from __future__ import annotations

from serverlessllm.core.errors import InvalidRequest


class MissingParameter(InvalidRequest):
    """A field that is needed is not there."""

    code = "missing_required_parameter"


class InvalidType(InvalidRequest):
    """A field has another JSON type than it must have."""

    code = "invalid_type"


class InvalidValue(InvalidRequest):
    """A field's value is none of those it may have."""

    code = "invalid_value"


class BelowMinimum(InvalidRequest):
    """An integer is too small."""

    code = "integer_below_min_value"


class AboveMaximum(InvalidRequest):
    """An integer is too large."""

    code = "integer_above_max_value"


class DecimalBelowMinimum(InvalidRequest):
    """A number is too small."""

    code = "decimal_below_min_value"


class DecimalAboveMaximum(InvalidRequest):
    """A number is too large."""

    code = "decimal_above_max_value"


class TextTooShort(InvalidRequest):
    """A text is empty that must not be."""

    code = "string_below_min_length"


class TextTooLong(InvalidRequest):
    """A text has too many characters."""

    code = "string_above_max_length"


class EmptyArray(InvalidRequest):
    """An array has nothing in it that must have something."""

    code = "empty_array"


class ArrayTooLong(InvalidRequest):
    """An array has too many items."""

    code = "array_above_max_length"


class ObjectTooLarge(InvalidRequest):
    """An object has too many properties, or too many bytes."""

    code = "object_above_max_properties"
