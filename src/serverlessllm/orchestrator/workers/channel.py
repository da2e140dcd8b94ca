"""One end of the socket between the main process and a worker."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import msgspec

from serverlessllm.orchestrator.workers.messages import (
    HEAD_BYTES,
    FromWorker,
    ToWorker,
    body_bytes,
    frame,
)

_UNSENT_BYTES_MAX = 1024 * 1024
"""More is not sent before the other end has taken some; what must not be lost is said again."""

Heard = TypeVar("Heard")


class Channel(asyncio.Protocol, Generic[Heard]):
    """Whole messages in both directions, in order; a stream socket loses none.

    `on_message` gets each one; `on_room` is called when the other end, after it had not kept up,
    has; `on_end` once, when the other end is gone or talks nonsense.
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[Heard],
        on_message: Callable[[Heard], None],
        on_end: Callable[[], None],
        on_room: Callable[[], None] | None = None,
    ) -> None:
        self._decode = decoder.decode
        self._on_message = on_message
        self._on_end = on_end
        self._on_room = on_room
        self._transport: asyncio.Transport | None = None
        self._come = bytearray()
        self.full = False
        """The other end does not keep up."""
        self.ended = False

    async def open(self, end: socket.socket) -> None:
        """Talk over this socket, which is the channel's from here on."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self, sock=end)

    def send(self, message: ToWorker | FromWorker) -> None:
        """Write, without waiting; nothing when the other end is gone."""
        self.send_frame(frame(message))

    def send_frame(self, data: bytes) -> None:
        """The same, of a message that is encoded already."""
        if self._transport is not None and not self.ended:
            self._transport.write(data)

    def close(self) -> None:
        """Send what is unsent, then close."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    # The transport's events.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_UNSENT_BYTES_MAX)

    def data_received(self, data: bytes) -> None:
        come = self._come
        come += data
        begin = 0
        try:
            while len(come) - begin >= HEAD_BYTES:
                end = begin + HEAD_BYTES + body_bytes(come[begin : begin + HEAD_BYTES])
                if len(come) < end:
                    break
                message = self._decode(memoryview(come)[begin + HEAD_BYTES : end])
                begin = end
                self._on_message(message)
        except (ValueError, msgspec.MsgspecError):
            self.abort()
            return
        del come[:begin]

    def eof_received(self) -> None:
        """The end is the other end's end: nothing is kept open for it."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's
        self.ended = True
        self._on_end()

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        if self._on_room is not None:
            self._on_room()
