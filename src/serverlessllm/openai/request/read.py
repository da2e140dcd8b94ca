"""From bytes to a request's struct; what msgspec says against them in the contract's words."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec

from serverlessllm.core.errors import InvalidJSON, InvalidRequest, UnsupportedMediaType
from serverlessllm.openai.nesting import check_nesting, hand_over
from serverlessllm.openai.request.errors import (
    AboveMaximum,
    ArrayTooLong,
    BelowMinimum,
    DecimalAboveMaximum,
    DecimalBelowMinimum,
    EmptyArray,
    InvalidType,
    InvalidValue,
    MissingParameter,
    ObjectTooLarge,
    TextTooLong,
    TextTooShort,
)
from serverlessllm.openai.request.patterns import PATTERN_WORDS
from serverlessllm.openai.settings import RequestLimits

T = TypeVar("T")

_WORDS_MAX: Final = 200
"""Of what msgspec says: it may repeat a value of megabytes."""
_PATH: Final = " - at `"
_missing: Final = re.compile(r"Object missing required field `(?P<field>[^`]*)`")
_bound: Final = re.compile(r"Expected `(?P<kind>\w+)` (?P<length>of length )?(?P<side>[<>]=?)")
_pattern: Final = re.compile(r"Expected `str` matching regex '(?P<pattern>.*)'")
_OUT_OF_BOUNDS: Final[dict[tuple[str, str], type[InvalidRequest]]] = {
    ("int", ">"): BelowMinimum,
    ("int", "<"): AboveMaximum,
    ("float", ">"): DecimalBelowMinimum,
    ("float", "<"): DecimalAboveMaximum,
    ("str", ">"): TextTooShort,
    ("str", "<"): TextTooLong,
    ("array", ">"): EmptyArray,
    ("array", "<"): ArrayTooLong,
    ("object", "<"): ObjectTooLarge,
}


def check_content_type(content_type: str | None) -> None:
    """Raise `UnsupportedMediaType` unless it is JSON (or not said at all)."""
    if content_type is None or content_type == "application/json":
        return
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise UnsupportedMediaType(
            "the body must be JSON: send it with the header 'content-type: application/json'"
        )


def read_request(decoder: msgspec.json.Decoder[T], body: bytes, limits: RequestLimits) -> T:
    """The body as the decoder's type.

    Raises:
        InvalidJSON: not UTF-8, not JSON, nested too deep, or not an object.
        InvalidRequest: a field is missing, of a wrong type or out of range; `param` names it.
    """
    check_nesting(body, limits)
    hand_over(len(body))
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as found:
            raise InvalidJSON(f"the body is not UTF-8 (byte {found.start})") from found
    hand_over(len(body))
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as invalid:
        raise explain(invalid) from invalid
    except msgspec.DecodeError as broken:
        raise InvalidJSON(f"the body is not JSON: {broken}") from broken
    except RecursionError as deep:
        raise InvalidJSON("the body is nested too deep") from deep


def explain(error: msgspec.ValidationError, inside: str = "") -> InvalidRequest | InvalidJSON:
    """msgspec's sentence and path as our error; `inside` is the field that was decoded alone."""
    what, at, path = str(error).rpartition(_PATH)
    if not at:
        what, path = path, ""
    path = path.rstrip("`").rpartition("`")[2]  # a key's own path is "key` in `$.field"
    param = f"{inside}{path.removeprefix('$')}".removeprefix(".")
    missing = _missing.match(what)
    if missing is not None:
        param = f"{param}.{missing['field']}" if param else missing["field"]
        return MissingParameter(f"{param}: this field is required", param=param)
    if not param:
        return InvalidJSON("the body must be a JSON object")
    kind, words = _kind(what)
    return kind(f"{param}: {words}", param=param)


def _words(pattern: str) -> str:
    """What a text must look like; `pattern` as it stands inside quotes."""
    known = (words for one, words in PATTERN_WORDS.items() if repr(one)[1:-1] == pattern)
    return next(known, "has not the form it must have")


def _kind(what: str) -> tuple[type[InvalidRequest], str]:
    """Which error it is, and how it is said."""
    pattern = _pattern.match(what)
    if pattern is not None:
        return InvalidValue, _words(pattern["pattern"])
    words = what[:_WORDS_MAX]
    words = f"{words[:1].lower()}{words[1:]}"
    bound = _bound.match(what)
    if bound is not None:
        return _OUT_OF_BOUNDS.get((bound["kind"], bound["side"][0]), InvalidValue), words
    if what.startswith("Expected "):
        return InvalidType, words
    return InvalidValue, words
