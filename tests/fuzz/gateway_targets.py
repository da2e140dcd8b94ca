"""What is fuzzed of the gateway: bytes of clients and of engines, cut anywhere.

A target takes any bytes. It may refuse them by an error of the contract; whatever it accepts must
mean the same to somebody else who reads it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any, cast

import h11
import httptools
import msgspec
from google.protobuf.message import DecodeError

from serverlessllm.core.errors import SLLMError
from serverlessllm.edge.connection import Connection
from serverlessllm.edge.link import DEAD, DONE, Link
from serverlessllm.edge.request import Request
from serverlessllm.edge.response import Decoder, Response
from serverlessllm.edge.server import EdgeServer
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.upstream import Pool, Upstreams
from serverlessllm.edge.wire import forwarded_head
from serverlessllm.openai.answers import (
    Asked,
    Kind,
    Stamp,
    StreamedAnswer,
    complete,
    engine_body,
    not_streamed,
    read_asked,
)
from serverlessllm.openai.errors import render_error
from serverlessllm.openai.messages.chat import to_chat as message_to_chat
from serverlessllm.openai.messages.request import parse_create as parse_message
from serverlessllm.openai.request import parse_chat, parse_completion, parse_embeddings
from serverlessllm.openai.rerank import parse_rerank
from serverlessllm.openai.responses.chat import to_chat as response_to_chat
from serverlessllm.openai.responses.items import ItemReference
from serverlessllm.openai.responses.request import parse_create as parse_response
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.openai.tokenize import parse_detokenize, parse_tokenize
from serverlessllm.orchestrator.grpc.proto.open_inference_pb2 import ModelInferRequest
from serverlessllm.orchestrator.grpc.texts import read_request as read_infer
from serverlessllm.testing.clock import VirtualClock

LIMITS = RequestLimits()
STAMP = Stamp(name="fuzz", created_s=1)
_ANSWER_STATUSES = range(200, 600)


class Line(asyncio.Transport):
    """Takes what is written; the other end says nothing by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.open = True

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.open = False

    def is_closing(self) -> bool:
        return not self.open

    abort = write_eof = close

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    pause_reading = resume_reading = lambda self: None


class Edge:
    """A connection of a real server, and what its handler was given."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str, bytes]] = []
        settings = EdgeSettings(pipeline_max=10_000, header_bytes_max=2048, body_bytes_max=4096)
        self._server = EdgeServer(
            self._handle, settings, render_error, VirtualClock(), stepped=True
        )
        self._server.loop = LOOP
        self.line = Line()
        self.connection = Connection(self._server)
        self.connection.connection_made(self.line)

    async def _handle(self, request: Request) -> None:
        body = await request.body()
        self.requests.append((request.method, request.path, request.query, body))
        request.respond(200, (), b"ok")

    async def play(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            if self.line.open:
                self.connection.data_received(piece)
            answered = -1
            while answered < len(self.line.written):  # pipelined: one a turn
                answered = len(self.line.written)
                for _ in range(_TURNS):
                    await asyncio.sleep(0)
        self.connection.connection_lost(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


LOOP = asyncio.new_event_loop()
_UNHANDLED: list[dict[str, Any]] = []
LOOP.set_exception_handler(lambda _, told: _UNHANDLED.append(told))
_TURNS = 4
"""Of the loop, in which a handler that waits for its body goes on."""


def _cut(data: bytes) -> list[bytes]:
    chance = random.Random(data)
    places = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(6)))
    starts, ends = [0, *places], [*places, len(data)]
    return [data[start:end] for start, end in zip(starts, ends, strict=True) if end > start]


def http_requests(data: bytes) -> None:
    """What a client sends: cut anywhere it is the same requests, and somebody stricter reads no
    other ones in it; each is answered once, and at most one refusal follows."""
    whole, pieces = Edge(), Edge()
    LOOP.run_until_complete(whole.play([data]))
    LOOP.run_until_complete(pieces.play(_cut(data)))
    assert not _UNHANDLED, _UNHANDLED
    assert pieces.requests == whole.requests, (pieces.requests, whole.requests)
    for edge in (whole, pieces):
        answers = _answers(bytes(edge.line.written))
        assert len(edge.requests) <= answers.count(200) <= len(edge.requests)
        assert len(answers) - answers.count(200) <= 1, answers
    strict, complete = _strictly(data)
    ours = whole.requests
    shared = min(len(ours), len(strict))
    for mine, theirs in zip(ours, strict, strict=False):
        assert (mine[0], mine[3]) == (theirs[0], theirs[2]), (mine, theirs)
    if complete:
        assert len(ours) == shared, (ours[shared:], strict)


def _answers(data: bytes) -> list[int]:
    """The statuses of a connection's answers; none is cut off."""
    statuses = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 100:
            data = rest
            continue
        assert status in _ANSWER_STATUSES
        assert b"\r\nx-request-id: " in head
        statuses.append(status)
        length = 0
        for line in head.split(b"\r\n"):
            if line.startswith(b"content-length: "):
                length = int(line.partition(b": ")[2])
        if not rest[:length].startswith((b"ok", b"{")):
            length = 0  # HEAD
        data = rest[length:]
    return statuses


def _strictly(data: bytes) -> tuple[list[tuple[str, str, bytes]], bool]:
    """The whole requests that h11 reads, and whether it has read everything, or gave up."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    found: list[tuple[str, str, bytes]] = []
    reader.receive_data(data)
    method, target, body = "", "", b""
    try:
        while True:
            event = reader.next_event()
            if isinstance(event, h11.Request):
                method, target, body = event.method.decode(), event.target.decode("latin-1"), b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                found.append((method, target, body))
                reader.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                reader.send(h11.EndOfMessage())
                if reader.our_state is h11.MUST_CLOSE:
                    return found, True
                reader.start_next_cycle()
            else:
                return found, event is h11.NEED_DATA
    except (h11.ProtocolError, UnicodeDecodeError):
        return found, False


def http_answers(data: bytes) -> None:
    """What an engine sends: it is an answer or an error of ours, the same wherever it is cut."""
    whole, pieces = _ask([data]), _ask(_cut(data))
    assert not _UNHANDLED, _UNHANDLED
    if whole[0] == "answer" or pieces[0] == "error":
        assert whole == pieces, (whole, pieces)  # else there was more, which only one saw in time


def _ask(pieces: list[bytes]) -> tuple[str, tuple[int, bytes, bytes] | None]:
    owner = Upstreams(UpstreamSettings(head_bytes_max=2048), VirtualClock())
    owner.loop = LOOP
    pool = Pool(owner, cast(Any, "unix:/nowhere"))
    line, link = Line(), Link(pool)
    link.connection_made(line)
    link.send(b"GET / HTTP/1.1\r\n\r\n", None, bodiless=False)
    for piece in pieces:
        if line.open and link.state is not DONE:
            link.data_received(piece)
    if line.open and link.state is not DONE:
        link.eof_received()
        link.connection_lost(None)
    if link.state is DEAD or not link.status:
        assert link.error is not None
        assert not link.reusable
        return "error", None
    assert link.state is DONE
    response = Response(link)
    body: list[bytes] = []

    async def read() -> None:
        body.append(await response.read(1 << 20))

    try:
        LOOP.run_until_complete(read())
    except SLLMError:
        return "error", None
    kind = response.headers.get("content-type")
    assert kind is None or "\n" not in kind
    client = forwarded_head(link.head, keep_framing=True)
    assert client.startswith(b"HTTP/1.1 ")
    assert b"\n" not in client.replace(b"\r\n", b"")
    return "answer", (link.status, body[0], link.trailers)


def chunks(data: bytes) -> None:
    """A body's chunk framing: taken off alike wherever it is cut."""
    assert _decoded([data]) == _decoded(_cut(data))


def _decoded(pieces: list[bytes]) -> tuple[bytes, bool]:
    body = bytearray()
    decoder = Decoder(body.extend)
    try:
        for piece in pieces:
            decoder.feed(piece)
    except httptools.HttpParserError:
        return b"", False
    return bytes(body), True


_PARSERS: tuple[Callable[[bytes, RequestLimits], object], ...] = (
    parse_chat,
    parse_completion,
    parse_embeddings,
    parse_tokenize,
    parse_detokenize,
    parse_rerank,
)


def requests(data: bytes) -> None:
    """A client's JSON: taken, or refused by an error that is the client's and can be told."""
    for parse in _PARSERS:
        try:
            parse(data, LIMITS)
        except SLLMError as error:
            _check_refusal(error)
        else:
            json.loads(data)  # the engine can read it, too
            for kind in Kind:
                try:
                    engine_body(read_asked(kind, data), data, "m", streams_usage=True)
                except SLLMError as error:
                    _check_refusal(error)


def dialects(data: bytes) -> None:
    """A client's JSON in the other dialects: what is taken is a chat that is taken."""
    chats = []
    try:
        chats.append(message_to_chat(parse_message(data, LIMITS)).body)
    except SLLMError as error:
        _check_refusal(error)
    try:
        create = parse_response(data, LIMITS, "0" * 32)
        items = [item for item in create.items if not isinstance(item, ItemReference)]
        chats.append(response_to_chat(create, (), items).body)
    except SLLMError as error:
        _check_refusal(error)
    for chat in chats:
        try:
            parse_chat(chat, LIMITS)
        except SLLMError as error:
            _check_refusal(error)


def _check_refusal(error: SLLMError) -> None:
    assert 400 <= error.status < 500, error
    status, headers, body = render_error(error)
    assert status == error.status
    assert set(msgspec.json.decode(body)["error"]) == {"message", "type", "param", "code"}
    assert len(body) < 8192
    assert all("\n" not in value for _, value in headers)


_ASKED = [
    Asked(kind=kind, model="m", include_usage=True, logprobs=True, base64=kind is Kind.EMBEDDINGS)
    for kind in Kind
]


def engine_answers(data: bytes) -> None:
    """A whole answer of an engine: spec-complete JSON, or an error of ours."""
    for asked in _ASKED:
        try:
            found = complete(asked, data, STAMP)
        except SLLMError:
            continue
        assert isinstance(msgspec.json.decode(found.body), dict)
    assert not_streamed(data, Kind.CHAT).status >= 400


def engine_streams(data: bytes) -> None:
    """A stream of an engine: whole events, the same wherever it is cut."""
    for asked in _ASKED[:2]:
        whole, one = _streamed(asked, [data])
        pieces, other = _streamed(asked, _cut(data))
        assert one.done is other.done
        assert pieces == whole
        if one.done:
            assert whole.endswith(b"data: [DONE]\n\n")
        for event in whole.split(b"\n\n")[:-1]:
            assert event.startswith((b"data: ", b":")), event
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                msgspec.json.decode(event[6:])


def _streamed(asked: Asked, pieces: list[bytes]) -> tuple[bytes, StreamedAnswer]:
    answer = StreamedAnswer(asked, STAMP)
    out = b"".join([*(answer.feed(piece) for piece in pieces), answer.end()])
    assert answer.done is not (answer.error is not None)
    return out, answer


def infer_requests(data: bytes) -> None:
    """A request of the Open Inference Protocol, as protobuf."""
    request = ModelInferRequest()
    try:
        request.ParseFromString(data)
    except DecodeError:
        return
    try:
        wanted = read_infer(request, RequestLimits())
    except SLLMError as error:
        _check_refusal(error)
        return
    assert isinstance(msgspec.json.decode(msgspec.json.encode(wanted)), dict)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "http_requests": http_requests,
    "http_answers": http_answers,
    "chunks": chunks,
    "requests": requests,
    "dialects": dialects,
    "engine_answers": engine_answers,
    "engine_streams": engine_streams,
    "infer_requests": infer_requests,
}
