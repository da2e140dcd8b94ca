"""What a body may be made of, before any parser sees it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import InvalidJSON
from serverlessllm.openai.nesting import check_nesting
from serverlessllm.openai.settings import RequestLimits

TEXTS = st.text(alphabet='ab\\"[]{}/,:\n\u00e9\u0000bfnrtu', max_size=12)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=24,
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


@given(VALUES, st.booleans(), st.booleans())
def test_depth_is_what_a_parser_would_find(value: Any, ascii_only: bool, long: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode() + b" " * (20_000 * long)
    depth = depth_of(value)
    check_nesting(body, RequestLimits(depth_max=depth))
    if depth:
        with pytest.raises(InvalidJSON, match="nested deeper"):
            check_nesting(body, RequestLimits(depth_max=depth - 1))


def members_of(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(members_of, value.values()))
    return sum(map(members_of, value)) if isinstance(value, list) else 0


@given(VALUES, st.booleans())
def test_members_are_those_that_a_parser_would_find(value: Any, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode() + b" " * 20_000
    members = members_of(value)
    check_nesting(body, RequestLimits(members_max=members))
    if members:
        with pytest.raises(InvalidJSON, match=f"more than {members - 1} members"):
            check_nesting(body, RequestLimits(members_max=members - 1))


@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused(data: bytes) -> None:
    try:
        check_nesting(data, RequestLimits(depth_max=2))
    except InvalidJSON:
        return


@pytest.mark.parametrize(
    ("piece", "limit"),
    [
        (b'""', "strings"),
        (b"[]", "arrays and objects"),
        (b'{"a":1}', "strings"),
        (b"1", "commas"),
    ],
)
def test_more_than_a_body_may_have_is_refused(piece: bytes, limit: str) -> None:
    body = b"[" + b",".join([piece] * (4_000_000 // (len(piece) + 1))) + b"]"
    limits = RequestLimits()
    if piece != b"1":
        limits = msgspec.structs.replace(limits, commas_max=len(body))
    with pytest.raises(InvalidJSON, match=f"more than [0-9]+ {limit}"):
        check_nesting(body, limits)


@pytest.mark.parametrize("escape", [b"\\u0000", b'\\"', b"\\\\", b"\\ud83d\\ude00"])
def test_more_escapes_than_any_text_has_are_refused(escape: bytes) -> None:
    body = b'"' + escape * (4_000_000 // len(escape)) + b'"'
    with pytest.raises(InvalidJSON, match="backslashes"):
        check_nesting(body, RequestLimits())


def test_a_long_text_of_program_code_passes() -> None:
    code = 'if (a["b\\n"] == {c: [1, 2]}) {\n\treturn "\\\\";\n}\n' * 20_000
    check_nesting(json.dumps({"content": code}).encode(), RequestLimits())
