"""What a request must be before it costs anything, and how fast that is known."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import (
    InvalidJSON,
    InvalidModelName,
    InvalidRequest,
    SLLMError,
    UnsupportedMediaType,
)
from serverlessllm.openai.request import (
    ParsedRequest,
    check_content_type,
    parse_chat,
    parse_completion,
    parse_embeddings,
)
from serverlessllm.openai.settings import RequestLimits

LIMITS = RequestLimits()
MIB = 1 << 20
USER = {"role": "user", "content": "hi"}


def chat(**fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": [USER]} | fields).encode()


def with_field(raw: bytes) -> bytes:
    """A chat with one more field, spelled out."""
    return b'{"model":"m","messages":[{"role":"user","content":"hi"}],"z":' + raw + b"}"


def test_only_what_routing_needs_is_kept() -> None:
    body = chat(model="org/name@rev", stream=True, keep_alive="5m", unknown={"a": [1, None]})
    assert parse_chat(body, LIMITS) == ParsedRequest(
        model="org/name@rev",  # type: ignore[arg-type]  # a NewType of str
        stream=True,
        keep_alive_s=300.0,
    )


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [(0, 0.0), (-1, -1.0), (2.5, 2.5), ("1h30m", 5400.0), ("-1", -1.0), (None, None)],
)
def test_keep_alive(keep_alive: object, seconds: float | None) -> None:
    assert parse_chat(chat(keep_alive=keep_alive), LIMITS).keep_alive_s == seconds


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"stop": None, "n": None, "temperature": None, "stream": None, "max_tokens": None},
        {"stop": ["a"] * 4, "n": 128, "temperature": 2, "top_p": 1, "max_tokens": 1},
    ],
)
def test_what_clients_send_is_accepted(fields: dict[str, object]) -> None:
    assert parse_chat(chat(**fields), LIMITS).model


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
        ({"stream": "yes"}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1e30}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "a" * 5000}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"keep_alive": "5 parsecs"}, "keep_alive"),
        ({"keep_alive": True}, "keep_alive"),
    ],
)
def test_the_field_that_is_wrong_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(chat(**fields), LIMITS)
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_missing_field_is_named() -> None:
    for body, param in ((b"{}", "model"), (b'{"model":"m"}', "messages")):
        with pytest.raises(InvalidRequest) as caught:
            parse_chat(body, LIMITS)
        assert caught.value.param == param


@pytest.mark.parametrize("name", ["", "../a", "a/b/c", "a b", "a\0", "a/../b", "é"])
def test_a_model_name_that_cannot_be_one(name: str) -> None:
    with pytest.raises(InvalidModelName):
        parse_chat(chat(model=name), LIMITS)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"[]",
        b"null",
        b'"text"',
        b"1",
        b"{",
        chat() + b" {}",
        b"{'model':'m'}",
        with_field(b"NaN"),
        with_field(b"-Infinity"),
        with_field(b"01"),
        with_field(b'"\xff"'),
        with_field(b'"\xed\xa0\x80"'),
        b"\xef\xbb\xbf" + chat(),
        with_field(b"[" * 64 + b"]" * 64),
        with_field(b'{"a":' * 64 + b"1" + b"}" * 64),
        with_field(b"[" * 100_000),
        b"[" * 5_000_000,
        b'{"a":' * 1_000_000,
    ],
)
def test_what_is_not_a_json_object_in_bounds(body: bytes) -> None:
    with pytest.raises(InvalidJSON):
        parse_chat(body, LIMITS)


def test_depth_is_counted_outside_of_strings() -> None:
    bodies = (
        with_field(b"[" * 63 + b"]" * 63),
        chat(messages=[{"role": "user", "content": '[{"\\' * 200}]),
        chat(messages=[{"role": "user", "content": "x"}] * 500),
    )
    assert all(parse_chat(body, LIMITS).model for body in bodies)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='[]{}"\\ é\n'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='[{"\\'), inner),
    max_leaves=40,
)


def _depth(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


@given(json_values, st.integers(1, 8), st.booleans())
def test_depth_is_exact(value: object, depth_max: int, ascii_only: bool) -> None:
    body = json.dumps({"model": "m", "messages": [USER], "z": value}, ensure_ascii=ascii_only)
    limits = RequestLimits(depth_max=depth_max)
    deep = max(3, 1 + _depth(value)) > depth_max
    try:
        parse_chat(body.encode(), limits)
    except InvalidJSON:
        assert deep
    else:
        assert not deep


@given(st.binary(max_size=200))
def test_any_bytes_give_an_answer_or_an_error_of_the_contract(body: bytes) -> None:
    for parse in (parse_chat, parse_completion, parse_embeddings):
        with pytest.raises(SLLMError):
            parse(body, LIMITS)


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/x+json",
    ],
)
def test_json_content_types(kind: str | None) -> None:
    check_content_type(kind)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/jsonp", ""])
def test_other_content_types(kind: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        check_content_type(kind)


HOSTILE = {
    "one long text": chat(messages=[{"role": "user", "content": "hello wo" * (MIB - 100)}]),
    "escapes": with_field(b'"' + b'\\n\\"\\\\' * (8 * MIB // 6) + b'"'),
    "brackets, deep": with_field(b"[" * (4 * MIB)),
    "brackets, flat": with_field(b"[" + b"[]," * (8 * MIB // 3) + b"1]"),
    "brackets, combs": with_field(b"[" + (b"[" * 60 + b"]" * 60 + b",") * 800 + b"1]"),
    "numbers": with_field(b"[" + b"1," * (4 * MIB) + b"1]"),
    "strings": with_field(b"[" + b'"",' * (8 * MIB // 3) + b"1]"),
    "stops": chat(stop=[""] * 90_000),
    "messages": chat(messages=[USER] * 40_000),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_no_body_of_the_limits_size_holds_up_the_loop(body: bytes) -> None:
    assert len(body) <= 8 * MIB + 100
    fastest_s = min(_time_s(body) for _ in range(3))
    assert fastest_s < 0.1, "20 ms on a quiet machine; this one may be busy"


def _time_s(body: bytes) -> float:
    start_s = time.thread_time()
    with contextlib.suppress(SLLMError):
        parse_chat(body, LIMITS)
    return time.thread_time() - start_s
