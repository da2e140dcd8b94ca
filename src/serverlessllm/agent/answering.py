"""Engines' answers on their way to the client: made spec-complete as they pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from serverlessllm.core.agentapi import USAGE_HEADER
from serverlessllm.core.errors import BackendDied, SLLMError
from serverlessllm.core.units import KIB
from serverlessllm.edge.errors import UpstreamError
from serverlessllm.edge.link import BODY, CHUNKED, DONE
from serverlessllm.edge.request import Request
from serverlessllm.edge.response import Decoder, Response
from serverlessllm.edge.wire import chunk
from serverlessllm.openai.answers import (
    Asked,
    Stamp,
    StreamedAnswer,
    Usage,
    complete,
    not_streamed,
)
from serverlessllm.openai.errors import render_error
from serverlessllm.openai.sse import EVENT_STREAM_HEADERS, error_event

_OK = 200
_LONG_BYTES = 256 * KIB
"""A whole answer of more (embeddings) would keep the event loop for milliseconds."""
_JSON = ("content-type", "application/json")
_STREAM_HEADERS = (*EVENT_STREAM_HEADERS, ("trailer", USAGE_HEADER))
_DIED = BackendDied("the backend of this model died during the answer")


async def pass_whole(
    request: Request, response: Response, asked: Asked, stamp: Stamp, bytes_max: int
) -> None:
    """Answer with the engine's 2xx answer, at once.

    Raises:
        UpstreamError: it did not come, or is longer than `bytes_max`.
    """
    await respond_whole(request, await response.read(bytes_max), asked, stamp)


async def respond_whole(request: Request, body: bytes, asked: Asked, stamp: Stamp) -> None:
    """Answer with what an engine said, or with why it is no answer."""
    try:
        if len(body) <= _LONG_BYTES:
            answer = complete(asked, body, stamp)
        else:
            answer = await asyncio.to_thread(complete, asked, body, stamp)
    except SLLMError as error:
        request.respond(*render_error(error))
        return
    request.respond(_OK, (_JSON, *_told(answer.usage)), answer.body)


async def pass_stream(request: Request, response: Response, asked: Asked, stamp: Stamp) -> None:
    """Answer with the engine's 2xx answer, each event as it comes, holding no more than the
    client's write buffer may.

    Raises:
        UpstreamError: the engine died before anything of its answer was passed on.
    """
    if not (response.headers.get("content-type") or "").startswith("text/event-stream"):
        request.respond(*render_error(not_streamed(await response.read(), asked.kind)))
        return
    answer = StreamedAnswer(asked, stamp)
    link = response.link
    passing = _Passing(request, response, answer)
    passing.begin()
    try:
        while link.state is BODY:
            await link.wait()
    except asyncio.CancelledError:
        # Either the client has gone, or a drain's grace is over and it can still be told.
        if request.connected and request.started:
            _finish(request, answer, _DIED)
        raise
    finally:
        passing.stop()
    if link.state is DONE:
        passing.send(answer.end())
    elif not answer.over and not request.started and link.error is not None:
        raise link.error
    _finish(request, answer, _DIED)


async def pass_composed(
    request: Request, pieces: AsyncIterator[bytes], asked: Asked, stamp: Stamp
) -> None:
    """Answer with a stream that a dialect composes.

    Raises:
        UpstreamError: the engine died before anything of its answer was passed on.
    """
    answer = StreamedAnswer(asked, stamp)
    failure: SLLMError = _DIED
    try:
        async for piece in pieces:
            await _send(request, answer.feed(piece))
            if answer.over:
                break
        await _send(request, answer.end())
    except asyncio.CancelledError:
        if request.connected and request.started:
            _finish(request, answer, _DIED)
        raise
    except SLLMError as error:
        if not request.started and isinstance(error, UpstreamError):
            raise
        failure = _DIED if isinstance(error, UpstreamError) else error
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
    _finish(request, answer, failure)


async def _send(request: Request, data: bytes) -> None:
    if data:
        if not request.started:
            request.start(_OK, _STREAM_HEADERS)
        await request.write(data)


def _finish(request: Request, answer: StreamedAnswer, otherwise: SLLMError) -> None:
    """End the answer: well, or with its error, or with `otherwise` when it has none."""
    if answer.done:
        request.finish(_told(answer.usage))
        return
    error = answer.error or otherwise
    if not request.started:
        request.respond(*render_error(error))
        return
    event = error_event(error)
    request.line.send(chunk(event) if request.framed else event)
    request.finish()


def _told(usage: Usage | None) -> tuple[tuple[str, str], ...]:
    if usage is None:
        return ()
    return ((USAGE_HEADER, f"{usage.prompt_tokens} {usage.completion_tokens}"),)


class _Passing:
    """A stream on its way: no coroutine runs for an event, what comes in goes out at once."""

    passed_bytes = 0
    """What goes out is counted where it is sent."""

    def __init__(self, request: Request, response: Response, answer: StreamedAnswer) -> None:
        self._request = request
        self._answer = answer
        self._link = response.link
        self._loop = asyncio.get_running_loop()
        self._chunks: list[bytes] = []
        """Of one read, without their framing."""
        self._unframe = Decoder(self._chunks.append).feed
        self._stopped = False
        self.pause = self._link.pause
        self.resume = self._link.resume
        self.detach = self._link.detach

    def begin(self) -> None:
        """Let the body flow."""
        self._request.line.attach(self)
        self._link.attach(self._take_framed if self._link.framing is CHUNKED else self._take)

    def stop(self) -> None:
        """No more flows."""
        self._stopped = True
        self._request.line.release(self)

    def send(self, data: bytes) -> None:
        """Whole events, to the client."""
        if data:
            request = self._request
            if not request.started:
                request.start(_OK, _STREAM_HEADERS)
            request.line.send(chunk(data) if request.framed else data)

    def _take_framed(self, data: bytes) -> None:
        chunks = self._chunks
        self._unframe(data)
        if chunks:
            self._take(chunks[0] if len(chunks) == 1 else b"".join(chunks))
            chunks.clear()

    def _take(self, data: bytes) -> None:
        answer = self._answer
        self.send(answer.feed(data))
        if answer.error is not None:
            # Not from within the link's own callback, which is not done with these bytes.
            self._loop.call_soon(self._give_up)

    def _give_up(self) -> None:
        """Nothing that may still come makes this an answer: the engine need not go on."""
        if not self._stopped:
            self._link.abort()
