"""Errors in every dialect, and nonsense."""

from __future__ import annotations

import pytest

from serverlessllm.core.errors import SLLMError
from serverlessllm.openai.answers import (
    Asked,
    Kind,
    Stamp,
    StreamedAnswer,
    complete,
    not_streamed,
)
from serverlessllm.openai.answers.events import EVENT_BYTES_MAX

CHAT = Asked(kind=Kind.CHAT, model="m", stream=True)
STAMP = Stamp("s", 1)
TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


def feed(*pieces: bytes, asked: Asked = CHAT) -> tuple[bytes, StreamedAnswer]:
    answer = StreamedAnswer(asked, STAMP)
    return b"".join(answer.feed(piece) for piece in pieces) + answer.end(), answer


@pytest.mark.parametrize(
    ("event", "status", "message"),
    [
        (b'data: {"error":{"message":"too long","code":400}}', 400, "too long"),
        (b'data: {"error":{"message":"no","type":"BadRequestError"}}', 400, "no"),
        (b'data: {"error":{"message":"cuda","code":500}}', 502, "status 500"),
        (b'data: {"error":"boom","error_type":"generation"}', 502, "status 500"),
        (b'data: {"object":"error","message":"bad","code":"400"}', 400, "bad"),
        (b'data: {"choices":[],"error":{"message":"busy","code":503}}', 503, "not ready"),
        (b'error: {"code":400,"message":"no such slot"}', 400, "no such slot"),
        (b'event: error\ndata: {"message":"broken"}', 502, "status 500"),
        (b'data: {"detail":"gone"}', 502, "status 500"),
        (b"data: <html>", 502, "not JSON"),
        (b'data: {"choices":[{"ind', 502, "not JSON"),
        (b"data: []", 502, "Expected `object`"),
        (b"data: 7", 502, "Expected `object`"),
        (b'data: {"pong":1}', 502, "neither"),
        (b'data: {"choices":[{"delta":{"content":7}}]}', 502, "Expected `str | null`"),
        (b'data: {"choices":{}}', 502, "Expected"),
        (b'data: {"choices":[{"index":-1}]}', 502, "Expected `int` >= 0"),
        (b'data: {"choices":[{"index":0,"delta":{"content":"\xff"}}]}', 502, "not JSON"),
        (b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"abort"}]}', 502, "gave up"),
        (b"data: " + b"[" * 100_000, 502, "cannot be read"),
        (b"data: " + b"x" * EVENT_BYTES_MAX + b"y", 502, "longer than"),
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_in_a_stream(event: bytes, status: int, message: str, begun: bool) -> None:
    said, answer = feed(TEXT if begun else b"", event + b"\n\n", TEXT, END, b"data: [DONE]\n\n")
    assert answer.error is not None
    assert (answer.error.status, answer.done) == (status, False)
    assert message in answer.error.message
    assert b"[DONE]" not in said
    assert (said.count(b"data: ") == 1) is begun


def test_what_came_in_the_same_read_as_a_failure_is_not_lost() -> None:
    answer = StreamedAnswer(CHAT, STAMP)
    said = answer.feed(TEXT + b'data: {"error":"x"}\n\n')
    assert b"Hi" in said
    assert answer.error is not None


@pytest.mark.parametrize("data", [b"", TEXT, b"data: [DONE]\n\n", b": ping\n\n", TEXT + b"data: {"])
def test_an_early_end(data: bytes) -> None:
    said, answer = feed(data)
    assert answer.error is not None
    assert answer.error.status == 502
    assert b"[DONE]" not in said


@pytest.mark.parametrize("end", [b"", b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n\r\n"])
def test_a_whole_answer_needs_no_mark_of_its_end(end: bytes) -> None:
    said, answer = feed(TEXT, END, end)
    assert answer.done
    assert said.endswith(b"data: [DONE]\n\n")
    assert answer.feed(TEXT) == b""


def test_done_ends_what_has_not_ended() -> None:
    said, answer = feed(TEXT, b"data: [DONE]\n\n", TEXT)
    assert answer.done
    assert said.count(b'"finish_reason":"stop"') == 1


def test_nothing_follows_a_choices_end() -> None:
    said, answer = feed(TEXT, END, TEXT, END)
    assert answer.done
    assert said.count(b"Hi") == said.count(b'"stop"') == 1


def test_too_many_calls() -> None:
    call = (
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":%d,"function":{"name":"f"}}]}}]}\n\n'
    )
    _, answer = feed(*(call % number for number in range(2000)))
    assert answer.error is not None


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        (Kind.CHAT, b"", 502),
        (Kind.CHAT, b"data: x", 502),
        (Kind.CHAT, b"[]", 502),
        (Kind.CHAT, b'{"choices":[]}', 502),
        (Kind.CHAT, b'{"choices":[{"message":{"content":["x"]}}]}', 502),
        (Kind.CHAT, b'{"choices":[{"message":{"tool_calls":[{"id":"x"}]}}]}', 502),
        (Kind.CHAT, b'{"choices":[{"finish_reason":"error","message":{}}]}', 502),
        (Kind.CHAT, b'{"error":{"message":"x","code":429}}', 429),
        (Kind.CHAT, b'{"object":"error","message":"x","code":400}', 400),
        (Kind.CHAT, b"[" * 100_000, 502),
        (Kind.CHAT, b'{"choices":[{"message":{"content":"\xff"}}]}', 502),
        (Kind.TEXT, b'{"choices":[{"text":7}]}', 502),
        (Kind.EMBEDDINGS, b'{"data":[]}', 502),
        (Kind.EMBEDDINGS, b'{"data":[{"embedding":[[1.0]]}]}', 502),
        (Kind.EMBEDDINGS, b'{"data":[{"embedding":["a"]}]}', 502),
        (Kind.EMBEDDINGS, b'{"data":[{"embedding":[null]}]}', 502),
        (Kind.EMBEDDINGS, b'{"data":[{"embedding":{"a":1}}]}', 502),
        (Kind.EMBEDDINGS, b'{"data":[{"embedding":7}]}', 502),
        (Kind.EMBEDDINGS, b'{"data":[{"embedding":"AAA"}]}', 502),
        (Kind.EMBEDDINGS, b'{"data":[{"embedding":"AADAfw=="}]}', 502),
        (Kind.EMBEDDINGS, b'{"error":"x"}', 502),
    ],
)
def test_a_failure_instead_of_an_answer(kind: Kind, body: bytes, status: int) -> None:
    with pytest.raises(SLLMError) as raised:
        complete(Asked(kind=kind, model="m"), body, STAMP)
    assert raised.value.status == status


@pytest.mark.parametrize(
    ("body", "status"),
    [(b'{"error":{"message":"x","code":400}}', 400), (b'{"choices":[]}', 502), (b"<html>", 502)],
)
def test_a_whole_answer_where_a_stream_was_asked_for(body: bytes, status: int) -> None:
    assert not_streamed(body, Kind.CHAT).status == status
