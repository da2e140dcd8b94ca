"""Errors as clients see them, ours and the backends'."""

from __future__ import annotations

import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core import errors
from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.errors import BackendDied, InvalidRequest, ModelLoading, SLLMError
from serverlessllm.core.ids import ModelId
from serverlessllm.openai.errors import render_error, translate_backend_error
from serverlessllm.openai.models import list_body, model_body, model_object
from serverlessllm.openai.sse import comment, error_event

TREE = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, SLLMError)
]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_has_the_four_keys(kind: type[SLLMError]) -> None:
    status, headers, body = render_error(kind("words"))
    fields = json.loads(body)["error"]
    assert list(fields) == ["message", "type", "param", "code"]
    assert fields["code"] == kind.code
    assert 400 <= status < 600
    assert status < 500 or status in {500, 502, 503, 504, 507}
    names = dict(headers)
    assert ("retry-after" in names) is (status in {429, 503})
    assert (names.get("x-should-retry") == "false") is kind.permanent


@pytest.mark.parametrize(
    ("after_s", "header"), [(None, "1"), (0.2, "1"), (7.4, "7"), (1e9, "120"), (-3, "1")]
)
def test_retry_after_is_in_what_clients_honour(after_s: float | None, header: str) -> None:
    _, headers, _ = render_error(ModelLoading("loading", retry_after_s=after_s))
    assert dict(headers)["retry-after"] == header


@pytest.mark.parametrize(
    ("status", "body", "expected", "code"),
    [
        (400, b'{"error":{"code":400,"message":"bad","type":"x"}}', 400, "invalid_request"),
        (422, b'{"detail":"bad"}', 400, "invalid_request"),
        (
            400,
            b'{"error":{"code":400,"message":"bad","type":"exceed_context_size_error"}}',
            400,
            "context_length_exceeded",
        ),
        (400, b'{"object":"error","message":"bad","code":400}', 400, "invalid_request"),
        (400, b'{"error":"bad"}', 400, "invalid_request"),
        (400, b"bad", 400, "invalid_request"),
        (401, b"bad", 502, "backend_protocol_error"),
        (404, b"bad", 400, "unsupported_operation"),
        (409, b"bad", 409, "conflict"),
        (413, b"bad", 413, "request_too_large"),
        (429, b"", 429, "queue_full"),
        (500, b'{"error":{"message":"at /srv/secret"}}', 502, "backend_protocol_error"),
        (
            500,
            b'{"error":{"message":"input (601 tokens) is too large to process. increase the"}}',
            400,
            "context_length_exceeded",
        ),
        (
            500,
            b'{"error":{"message":"Jinja Exception: roles must alternate"}}',
            400,
            "invalid_request",
        ),
        (501, b'{"error":{"message":"bad"}}', 400, "unsupported_operation"),
        (503, b'{"error":{"message":"Loading model"}}', 503, "overloaded"),
        (504, b"", 504, "deadline_exceeded"),
        (507, b"", 507, "out_of_space"),
        (302, b"", 502, "backend_protocol_error"),
    ],
)
def test_backends_errors_become_ours(status: int, body: bytes, expected: int, code: str) -> None:
    error = translate_backend_error(status, body)
    assert (error.status, error.code) == (expected, code)
    if b"bad" in body and 400 <= status < 500 and status != 401:
        assert error.message == "bad"
    assert "secret" not in error.message


@pytest.mark.parametrize(
    "body", [b"", b"<html>no</html>", b"{}", b"[1]", b"\xff\xfe", b"[" * 10_000]
)
def test_backends_that_say_nothing_useful(body: bytes) -> None:
    error = translate_backend_error(400, body)
    assert error.message
    assert error.message.isprintable()


@given(st.integers(300, 599), st.binary(max_size=300))
def test_any_backend_error_is_one_of_the_contract(status: int, body: bytes) -> None:
    rendered, _, text = render_error(translate_backend_error(status, body))
    assert rendered < 500 or rendered in {502, 503, 504, 507}
    json.loads(text)


def test_long_messages_are_cut() -> None:
    assert len(translate_backend_error(400, b"x" * 100_000).message) == 2000


def test_the_parameter_is_kept() -> None:
    error = translate_backend_error(400, b'{"error":{"message":"bad","param":"tools[0]"}}')
    assert isinstance(error, InvalidRequest)
    assert error.param == "tools[0]"


@pytest.mark.parametrize(
    ("route", "param"),
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/embeddings", "input"),
        ("/v1/rerank", "documents"),
        ("", None),
    ],
)
@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("the request exceeds the available context size", "exceed_context_size_error"),
        ("input (601 tokens) is too large to process. increase the batch size", "server_error"),
        ("This model's maximum context length is 20 tokens. However, you requested 30", "x"),
        ("The decoder prompt (length 50) is longer than the maximum model length of 20.", "x"),
        ("The input (50 tokens) is longer than the model's context length (20 tokens).", "x"),
    ],
)
def test_what_is_too_long_is_named(message: str, kind: str, route: str, param: str | None) -> None:
    said = json.dumps({"error": {"message": message, "type": kind, "param": None}}).encode()
    error = translate_backend_error(400, said, route)
    assert (error.code, error.param) == ("context_length_exceeded", param)
    assert error.message == message


def test_an_error_event_is_one_event() -> None:
    event = error_event(BackendDied("it\ndied"))
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2


def test_progress_is_a_comment() -> None:
    event = LoadEvent(
        state="loading", stage="nvme→dram", bytes_done=5, bytes_total=10, eta_s=1.5, hops=()
    )
    text = comment(event)
    assert text.startswith(b": ")
    assert text.endswith(b"\n\n")
    assert json.loads(text[2:]) == {
        "state": "loading", "stage": "nvme→dram", "bytes": 5, "total": 10, "eta_s": 1.5,
    }  # fmt: skip
    assert json.loads(comment(LoadEvent(state="queued"))[2:]) == {
        "state": "queued", "stage": "", "bytes": 0, "total": None,
    }  # fmt: skip


def test_models_as_the_api_shows_them() -> None:
    one = model_object(ModelId("org/name@rev"), 123)
    assert json.loads(model_body(one)) == {
        "id": "org/name@rev", "root": "org/name@rev", "object": "model", "created": 123,
        "owned_by": "org",
    }  # fmt: skip
    alias = json.loads(model_body(model_object(ModelId("org/name@rev"), 123, name="short")))
    assert (alias["id"], alias["root"], alias["owned_by"]) == ("short", "org/name@rev", "org")
    listed = json.loads(list_body([one, model_object(ModelId("smollm2"), 0)]))
    assert listed["object"] == "list"
    assert [model["owned_by"] for model in listed["data"]] == ["org", "serverlessllm"]
    assert json.loads(list_body([])) == {"object": "list", "data": []}
