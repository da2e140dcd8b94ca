"""A gRPC client of our services that needs no generated stub."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from serverlessllm.core.ids import Address
from serverlessllm.orchestrator.grpc.openai import SERVICE as OPENAI
from serverlessllm.orchestrator.grpc.proto.pool import POOL
from serverlessllm.orchestrator.grpc.proto.serverlessllm_pb2 import InferenceRequest
from serverlessllm.orchestrator.grpc.repository import SERVICE as TRITON

if TYPE_CHECKING:
    Stream = grpc.aio.StreamStreamCall[Any, Any] | grpc.aio.UnaryStreamCall[Any, Any]

__all__ = ["OPENAI", "TRITON", "Heard", "Rpc", "connected", "heard", "read", "read_all", "target"]

Metadata = tuple[tuple[str, str], ...]


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """A call that has ended."""

    messages: list[Any]
    code: grpc.StatusCode
    details: str
    initial: dict[str, str]
    trailing: dict[str, str]


def target(address: Address | None) -> str:
    """An address as gRPC writes it."""
    assert address is not None
    return address.removeprefix("http://")


class Rpc:
    """Calls methods by name; every answer is read as a stream, which is the same on the wire."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata = ()) -> None:
        self.channel = channel
        self.metadata = metadata

    def open(
        self,
        service: str,
        method: str,
        requests: Sequence[Message | bytes],
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
    ) -> Stream:
        """A running call with these messages."""
        # One message goes with its head, where the method takes one: gRPC's client hides the status
        # of a server that refused by the head alone, when a message is written after that.
        if len(requests) == 1 and not _method(service, method).client_streaming:
            single = self.channel.unary_stream(*_typed(service, method))
            return single(requests[0], metadata=(*self.metadata, *metadata), timeout=timeout_s)
        many = self.channel.stream_stream(*_typed(service, method))
        return many(iter(requests), metadata=(*self.metadata, *metadata), timeout=timeout_s)

    def stream(
        self,
        service: str,
        method: str,
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
    ) -> grpc.aio.StreamStreamCall[Any, Any]:
        """A running call, whose messages are written with `call.write`."""
        call = self.channel.stream_stream(*_typed(service, method))
        return call(metadata=(*self.metadata, *metadata), timeout=timeout_s)

    async def call(
        self,
        service: str,
        method: str,
        *requests: Message | bytes,
        metadata: Metadata = (),
        timeout_s: float | None = None,
    ) -> Heard:
        """A call to its end."""
        call = self.open(service, method, requests, metadata=metadata, timeout_s=timeout_s)
        return await heard(call, await read_all(call))

    async def openai(
        self, method: str, body: object, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Heard:
        """A call of our own service with a JSON body."""
        text = body if isinstance(body, str) else msgspec.json.encode(body).decode()
        request = InferenceRequest(json=text)
        return await self.call(OPENAI, method, request, metadata=metadata, timeout_s=timeout_s)


async def read(call: Stream) -> Any:
    """The next message of a call; `grpc.aio.EOF` at its end."""
    return await call.read()


async def read_all(call: Stream) -> list[Any]:
    """The messages that are still to come, whatever the end."""
    messages: list[Any] = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        while (message := await read(call)) is not grpc.aio.EOF:
            messages.append(message)
    return messages


async def heard(call: Stream, messages: list[Any]) -> Heard:
    """How a call has ended."""
    return Heard(
        messages=messages,
        code=await call.code(),
        details=await call.details() or "",
        initial=_dict(await call.initial_metadata()),
        trailing=_dict(await call.trailing_metadata()),
    )


def _method(service: str, method: str) -> MethodDescriptor:
    return POOL.FindServiceByName(service).methods_by_name[method]


def _typed(service: str, method: str) -> tuple[str, Any, Any]:
    """A method's path, and how its messages are written and read."""
    answer = GetMessageClass(_method(service, method).output_type)
    return f"/{service}/{method}", _encoded, answer.FromString


def _encoded(request: Any) -> bytes:
    data: bytes = request if isinstance(request, bytes) else request.SerializeToString()
    return data


def _dict(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    return {key: value for key, value in metadata or () if isinstance(value, str)}


@asynccontextmanager
async def connected(
    address: Address | None, metadata: Metadata = (), **options: int
) -> AsyncIterator[Rpc]:
    """A client on a connection of its own."""
    named = [(f"grpc.{key}", value) for key, value in options.items()]
    async with grpc.aio.insecure_channel(
        target(address), options=[("grpc.use_local_subchannel_pool", 1), *named]
    ) as channel:
        yield Rpc(channel, metadata)
