"""What the fake says: values that hold a schema, and words that come back from their tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.backends.inside.fake_words import Vocabulary, value_of


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({}, {}),
        ({"type": "object"}, {}),
        ({"const": 5}, 5),
        ({"enum": ["b", "a"]}, "b"),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, True),
        ({"type": ["integer", "null"], "minimum": 3}, 3),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2}, [None, None]),
        ({"type": "string", "minLength": 4, "maxLength": 4}, "a..."),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"const": 1}}}, {"a": 1}),
        ({"properties": {"a": {"$ref": "#/nowhere"}}, "required": ["b"]}, {"a": None, "b": None}),
        ("no schema", {}),
    ],
)
def test_a_value_holds_its_schema(schema: object, value: object) -> None:
    assert value_of(schema) == value


def test_a_schema_that_holds_itself_ends() -> None:
    assert value_of({"properties": {"a": {"$ref": "#"}}}) is not None


@given(st.text(max_size=60))
def test_words_come_back_from_their_tokens(text: str) -> None:
    vocabulary = Vocabulary()
    assert "".join(vocabulary.words(text)) == text
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_a_token_that_was_never_seen_has_a_text_too() -> None:
    assert Vocabulary().decode([7]) == " <7>"
