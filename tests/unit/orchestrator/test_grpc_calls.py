"""The boundary of a call, with a client that is held in hand."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from serverlessllm.core.errors import NoCapacity
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.orchestrator.grpc.calls import Call, Calls, one
from serverlessllm.orchestrator.grpc.proto import serverlessllm_pb2 as pb
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.waiting import eventually


class Context:
    """gRPC's side of a call: sends what is put, takes what it is let."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = [*messages, grpc.aio.EOF]
        self.sent: list[bytes] = []
        self.room = asyncio.Event()
        self.room.set()
        self.broken = False
        self.ended: dict[str, Any] = {}

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

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


@pytest.fixture
async def calls():
    clock = VirtualClock()
    made = Calls(EdgeSettings(), clock)
    made.start()
    yield made, clock
    await made.close()


async def echo(call: Call, request: pb.InferenceRequest) -> pb.InferenceRequest:
    return request


def start(calls, context, serve):
    handler = calls.handler(serve)
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
