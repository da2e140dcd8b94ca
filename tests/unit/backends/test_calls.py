"""Calls found in text, however it is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.backends.calls import Calls, Delta, delta_fields, message_fields

TAGGED = """I look.
<tool_call>
{"name": "f", "arguments": {"a": "}\\"{"}}
</tool_call>
<tool_call>{"name": "g", "arguments": {}}</tool_call>
"""
ANSWERS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ("hello", "hello", []),
    ("  {", "  {", []),
    ("[1, 2] and more", "[1, 2] and more", []),
    ('{"answer": 4}', '{"answer": 4}', []),
    ('{"name": "stranger", "parameters": {}}', '{"name": "stranger", "parameters": {}}', []),
    ("five < six <tool", "five < six <tool", []),
    ("<tool_call>words</tool_call> then", "<tool_call>words</tool_call> then", []),
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    ('{"type": "function", "name": "f", "parameters": {}}', "", [("f", {})]),
    ('{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}', "",
     [("f", {"x": 1})]),
    ('{"parameters": {"a": [1, {}]}, "name": "g"}', "", [("g", {"a": [1, {}]})]),
    ('{"name": "f"}', "", [("f", {})]),
    ('{"name": "f", "arguments": "{}"}', "", [("f", {})]),
    ('[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "",
     [("f", {"a": 1}), ("g", {})]),
    ('{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "",
     [("f", {"a": 1}), ("g", {})]),
    (TAGGED, "I look.", [("f", {"a": '}"{'}), ("g", {})]),
]  # fmt: skip


def found(pieces: Sequence[str], *, listed_only: bool = False) -> tuple[str, list[Delta]]:
    calls = Calls(["f", "g"], listed_only=listed_only)
    deltas = [delta for piece in pieces for delta in calls.push(piece)]
    deltas += calls.push("", whole=True)
    return "".join(delta.text for delta in deltas), deltas


def called(deltas: Sequence[Delta]) -> list[tuple[str, Any]]:
    calls = message_fields(deltas).get("tool_calls", [])
    assert isinstance(calls, list)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize(("answer", "text", "calls"), ANSWERS)
@given(data=st.data())
def test_calls_are_found_wherever_the_text_is_cut(
    answer: str, text: str, calls: list[tuple[str, Any]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)))))
    ends = [*cuts, len(answer)]
    pieces = [answer[start:end] for start, end in zip([0, *cuts], ends, strict=True)]
    said, deltas = found(pieces)
    assert called(deltas) == calls
    assert said == text


@given(st.text('{}[]",:\\ <>/_abcefglmnorstuy\n', max_size=80))
def test_no_text_is_too_odd(text: str) -> None:
    whole, deltas = found([text])
    pieces, others = found(list(text))
    assert whole == pieces
    assert [(d.call, d.name) for d in deltas if d.name] == [
        (d.call, d.name) for d in others if d.name
    ]


def test_a_call_is_said_as_it_comes() -> None:
    calls = Calls(["f"])
    assert calls.push('<tool_call>{"name": "f", "arguments": {"a": ') == [
        Delta(call=0, name="f"),
        Delta(call=0, arguments='{"a": '),
    ]
    assert calls.push('"on') == [Delta(call=0, arguments='"on')]
    assert calls.push('e"}}</tool_call>') == [Delta(call=0, arguments='e"}')]
    assert calls.count == 1


def test_a_forced_answer_that_is_cut_off_says_nothing_but_its_call() -> None:
    text, deltas = found(['{"name": "f", "argu'], listed_only=True)
    assert (text, deltas) == ("", [])
    text, deltas = found(['{"name": "f", "arguments": {"a"'], listed_only=True)
    assert text == ""
    assert message_fields(deltas)["tool_calls"][0]["function"]["arguments"] == '{"a"'  # type: ignore[index]


def test_without_tools_all_is_text() -> None:
    calls = Calls([])
    assert calls.push("<tool_call>{") == [Delta(text="<tool_call>{")]
    assert calls.push("", whole=True) == []


def test_parts_of_the_same_call_are_one_in_a_chunk() -> None:
    fields = delta_fields(
        [
            Delta(text="a"),
            Delta(call=0, name="f"),
            Delta(call=0, arguments="{"),
            Delta(call=0, arguments="}"),
            Delta(call=1, name="g", arguments="{}"),
        ]
    )
    parts = fields["tool_calls"]
    assert isinstance(parts, list)
    assert fields["content"] == "a"
    assert [part["index"] for part in parts] == [0, 1]
    assert parts[0]["function"] == {"name": "f", "arguments": "{}"}
    assert parts[0]["id"] != parts[1]["id"]
    assert delta_fields([Delta(call=1, arguments="x")])["tool_calls"] == [
        {"index": 1, "function": {"arguments": "x"}}
    ]
