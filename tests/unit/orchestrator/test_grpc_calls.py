"""The boundary of a call, with a client that is held in hand."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from serverlessllm.core.errors import NoCapacity, Unauthorized
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.orchestrator.grpc.calls import Call, Calls, one
from serverlessllm.orchestrator.grpc.proto import serverlessllm_pb2 as pb
from serverlessllm.orchestrator.rest.guard import Given
from serverlessllm.telemetry.metrics import render_metrics
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.waiting import eventually

Metadata = tuple[tuple[str, str | bytes], ...]


class Context:
    """gRPC's side of a call: sends what is put, takes what it is let."""

    def __init__(self, *messages: bytes, metadata: Metadata = ()) -> None:
        self.metadata = metadata
        self.messages = [*messages, grpc.aio.EOF]
        self.sent: list[bytes] = []
        self.room = asyncio.Event()
        self.room.set()
        self.broken = False
        self.ended: dict[str, Any] = {}

    def invocation_metadata(self) -> Metadata:
        return self.metadata

    def time_remaining(self) -> None:
        return None

    async def read(self) -> object:
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def write(self, data: bytes) -> None:
        await self.room.wait()
        if self.broken:
            raise grpc.aio.InternalError("the connection is gone")
        self.sent.append(data)

    def set_code(self, code: grpc.StatusCode) -> None:
        self.ended["code"] = code

    def set_details(self, details: str) -> None:
        self.ended["details"] = details

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self.ended["trailers"] = dict(metadata)


def check_key(given: Given) -> None:
    if given.get("authorization") == "Bearer wrong":
        raise Unauthorized("no good")


@pytest.fixture
async def calls():
    clock = VirtualClock()
    made = Calls(EdgeSettings(), clock, calls_max=1, check_key=check_key)
    made.start()
    yield made, clock
    await made.close()


async def echo(call: Call, request: pb.InferenceRequest) -> pb.InferenceRequest:
    return request


def start(calls, context, serve):
    handler = calls.handler("/a.Service/Method", serve)
    return asyncio.ensure_future(handler.stream_stream(None, context))


HELLO = pb.InferenceRequest(json="hello").SerializeToString()


async def test_a_good_call_ends_with_its_id(calls):
    made, _ = calls
    context = Context(HELLO)
    await start(made, context, one(pb.InferenceRequest, echo))
    assert context.sent == [HELLO]
    assert context.ended == {
        "trailers": {"x-request-id": context.ended["trailers"]["x-request-id"]}
    }


async def test_a_client_that_sends_nothing_is_cut(calls):
    made, clock = calls
    context = Context()
    context.messages.clear()
    running = start(made, context, one(pb.InferenceRequest, echo))
    await asyncio.sleep(0)
    await clock.advance(EdgeSettings().body_timeout_s - 2)
    assert not running.done()
    await clock.advance(4)
    await running
    assert context.ended["code"] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert context.ended["trailers"]["x-sllm-code"] == "request_timeout"


async def test_a_client_that_reads_nothing_is_cut(calls):
    made, clock = calls
    context = Context(HELLO)
    context.room.clear()
    running = start(made, context, one(pb.InferenceRequest, echo))
    await asyncio.sleep(0)
    await clock.advance(EdgeSettings().write_stall_timeout_s + 2)
    await running
    assert context.ended["code"] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_of_a_stranger_nothing_is_read(calls):
    made, _ = calls
    context = Context(HELLO, metadata=(("authorization", "Bearer wrong"),))
    await start(made, context, one(pb.InferenceRequest, echo))
    assert context.ended["code"] is grpc.StatusCode.UNAUTHENTICATED
    assert context.messages[0] == HELLO


async def test_calls_at_once_are_bounded_but_for_those_that_anybody_may_make(calls):
    made, clock = calls
    waiting = Context()
    waiting.messages.clear()
    running = start(made, waiting, one(pb.InferenceRequest, echo))
    await asyncio.sleep(0)
    refused = Context(HELLO)
    await start(made, refused, one(pb.InferenceRequest, echo))
    assert refused.ended["code"] is grpc.StatusCode.RESOURCE_EXHAUSTED
    public = made.handler("/a.Service/Public", one(pb.InferenceRequest, echo), public=True)
    served = Context(HELLO, metadata=(("authorization", "Bearer wrong"),))
    await public.stream_stream(None, served)
    assert served.sent == [HELLO]
    await clock.advance(EdgeSettings().body_timeout_s + 2)
    await running
    again = Context(HELLO)
    await start(made, again, one(pb.InferenceRequest, echo))
    assert again.sent == [HELLO]


async def test_metadata_that_would_break_out_of_a_header_is_not_there(calls):
    made, _ = calls
    seen: list[str | None] = []

    async def look(call: Call) -> None:
        seen.extend(call.said(name) for name in ("authorization", "x-sllm-wait", "x-blob-bin"))
        seen.append(call.id)

    metadata = (
        ("authorization", "Bearer a\r\nx-evil: 1"),
        ("x-sllm-wait", "5"),
        ("x-request-id", "a\nb"),
        ("x-blob-bin", b"\x00"),
    )
    context = Context(metadata=metadata)
    await start(made, context, look)
    assert seen[:3] == [None, "5", None]
    assert str(seen[3]).startswith("grpc-")


async def test_each_call_is_counted_by_its_method_and_outcome(calls):
    made, _ = calls
    wrong = Context(HELLO, metadata=(("authorization", "Bearer wrong"),))
    for context in (Context(HELLO), wrong):
        await start(made, context, one(pb.InferenceRequest, echo))
    broken = Context(HELLO)
    broken.broken = True
    await asyncio.wait([start(made, broken, one(pb.InferenceRequest, echo))])
    text = render_metrics().decode()
    for status in ("200", "401", "499"):
        line = f'sllm_requests_total{{model="",route="/a.Service/Method",status="{status}"}}'
        assert line in text


async def test_a_connection_that_breaks_is_a_client_that_left(calls):
    made, _ = calls
    context = Context(HELLO)
    context.broken = True
    running = start(made, context, one(pb.InferenceRequest, echo))
    await asyncio.wait([running])
    assert running.cancelled()


async def test_a_failure_is_the_status_and_a_bug_is_internal(calls):
    made, _ = calls

    async def full(call: Call) -> None:
        raise NoCapacity("no room", retry_after_s=7.0)

    async def bug(call: Call) -> None:
        raise KeyError("a secret")

    context = Context(HELLO)
    await start(made, context, full)
    assert context.ended["code"] is grpc.StatusCode.UNAVAILABLE
    assert context.ended["trailers"]["retry-after"] == "7"
    context = Context(HELLO)
    await start(made, context, bug)
    assert context.ended["code"] is grpc.StatusCode.INTERNAL
    assert "secret" not in context.ended["details"]


async def test_a_close_cancels_what_runs(calls):
    made, _ = calls
    context = Context()
    context.messages.clear()
    running = start(made, context, one(pb.InferenceRequest, echo))
    await asyncio.sleep(0)
    await made.close()
    await eventually(running.done)
    assert running.cancelled()
