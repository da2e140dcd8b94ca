"""What decides an answer's form, and the request as the engine gets it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import ClientError
from serverlessllm.openai.answers import Asked, Kind, engine_body, read_asked

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def put(body: bytes, model: str = "m", *, streams_usage: bool = True) -> bytes:
    return engine_body(read_asked(Kind.CHAT, body), body, model, streams_usage=streams_usage)


def test_what_is_read() -> None:
    body = b'{"model":"m","stream":true,"stream_options":{"include_usage":true},"logprobs":true}'
    assert read_asked(Kind.CHAT, body) == Asked(
        kind=Kind.CHAT, model="m", stream=True, include_usage=True, logprobs=True
    )


@pytest.mark.parametrize(
    ("kind", "logprobs", "asked"),
    [
        (Kind.CHAT, True, True),
        (Kind.CHAT, False, False),
        (Kind.CHAT, None, False),
        (Kind.TEXT, 0, True),
        (Kind.TEXT, 5, True),
        (Kind.TEXT, None, False),
        (Kind.TEXT, False, False),
    ],
)
def test_whether_log_probabilities_are_asked_for(kind: Kind, logprobs: Any, asked: bool) -> None:
    body = json.dumps({"model": "m", "logprobs": logprobs}).encode()
    assert read_asked(kind, body).logprobs is asked


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"model":7}', b"[" * 100_000])
def test_what_nobody_checked(body: bytes) -> None:
    with pytest.raises(ClientError):
        read_asked(Kind.CHAT, body)


def test_a_request_that_needs_nothing_passes_as_it_is() -> None:
    body = json.dumps(CHAT).encode()
    assert put(body) is body
    body = json.dumps(CHAT | {"stream": True}).encode()
    assert put(body, streams_usage=False) is body
    body = json.dumps(CHAT | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    assert put(body) is body


def test_a_streams_counts_are_asked_for() -> None:
    body = json.dumps(CHAT | {"stream": True}).encode() + b" \n"
    assert json.loads(put(body)) == CHAT | {
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert put(body).startswith(body.rstrip()[:-1])


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_also_where_there_are_options(options: object) -> None:
    body = json.dumps(CHAT | {"stream": True, "stream_options": options}).encode()
    assert json.loads(put(body))["stream_options"] == {"include_usage": True}


def test_a_name_that_is_spelled_with_escapes_is_found() -> None:
    body = b'{"model":"m","stream":true,"stream\\u005foptions":{"include_usage":false}}'
    put_body = put(body)
    assert put_body.count(b"options") == 1
    assert json.loads(put_body)["stream_options"] == {"include_usage": True}


def test_the_engine_gets_the_models_own_name_and_no_field_of_ours() -> None:
    body = json.dumps(CHAT | {"keep_alive": "5m", "x": [1, {"y": "z"}]}).encode()
    assert json.loads(put(body, "org/name")) == CHAT | {"model": "org/name", "x": [1, {"y": "z"}]}


@given(
    st.dictionaries(
        st.text(max_size=20),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=5,
        ),
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from(["m", "other"]),
)
def test_everything_else_is_left_alone(extra: dict[str, Any], stream: bool, model: str) -> None:
    ours = {"model", "stream", "stream_options", "logprobs", "keep_alive"}
    ours |= {"encoding_format", "dimensions"}
    extra = {name: value for name, value in extra.items() if name not in ours}
    body = json.dumps(CHAT | extra | {"stream": stream}).encode()
    expected = CHAT | extra | {"stream": stream, "model": model}
    if stream:
        expected["stream_options"] = {"include_usage": True}
    assert json.loads(put(body, model)) == expected
