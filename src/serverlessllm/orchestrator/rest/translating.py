"""The chat behind a request of another dialect: asked through the front door, told as it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import ParamSpec, Protocol, TypeVar

from serverlessllm.core.errors import (
    BackendDied,
    BackendProtocolError,
    Draining,
    SLLMError,
)
from serverlessllm.core.ids import ModelId
from serverlessllm.core.units import KIB
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import Response, UpstreamClosed, UpstreamUnreachable
from serverlessllm.openai.chats import (
    ChatAnswer,
    ChatUsage,
    Choice,
    Failure,
    Loading,
    failure_of,
    read_answer,
    read_failure,
)
from serverlessllm.openai.sse import EVENT_STREAM_HEADERS
from serverlessllm.orchestrator.rest.front import Front
from serverlessllm.orchestrator.timing import Timing

_P = ParamSpec("_P")
_T = TypeVar("_T")

OK = 200
JSON = ("content-type", "application/json")
_PASSED_ON = ("retry-after", "x-should-retry")
"""Header fields of a chat's error that mean the same in every dialect."""
_QUICK_BYTES = 64 * KIB
"""Of a body whose translation is no burden on the event loop."""
_DONE = b"[DONE]"
_DRAINING = Draining("this server is shutting down; send the request again")
_BROKEN_OFF = BackendDied("the model's answer broke off; send the request again")


class Story(Protocol):
    """A chat's stream in another dialect: each verb gives the bytes that tell of it."""

    def wait(self, loading: Loading) -> bytes:
        """The model's load goes on."""
        ...

    def take(self, choice: Choice) -> bytes:
        """A piece of the answer has come."""
        ...

    def end(self, usage: ChatUsage | None) -> bytes:
        """All of it has."""
        ...

    def fail(self, failure: Failure) -> bytes:
        """No more will."""
        ...


async def translate(
    size_bytes: int, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> _T:
    """Call `work`; where there is much to do, beside the event loop."""
    if size_bytes <= _QUICK_BYTES:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


@contextlib.asynccontextmanager
async def asked(front: Front, request: Request, path: str, body: bytes) -> AsyncIterator[Response]:
    """The answer to what the client's request was translated to; leaving cancels it.

    Raises:
        Draining, BackendDied, UpstreamError: this process's own front door did not answer.
    """
    try:
        async with front.ask_for(request, path, body) as response:
            request.state = timing = Timing(ModelId(""))
            timing.inner = _timing_lines(response)
            yield response
    except UpstreamUnreachable as error:
        raise _DRAINING from error
    except UpstreamClosed as error:
        raise _BROKEN_OFF from error


async def refusal(response: Response) -> tuple[Failure, list[tuple[str, str]]]:
    """Why there is no answer, and the header fields to say so with."""
    headers = [
        (name, value) for name in _PASSED_ON if (value := response.headers.get(name)) is not None
    ]
    return read_failure(response.status, await response.read()), [JSON, *headers]


async def whole_answer(response: Response, bytes_max: int) -> ChatAnswer:
    """An answer that is not streamed; it has a choice.

    Raises:
        BackendProtocolError: it is not what a chat answers.
    """
    answer = read_answer(await response.read(bytes_max))
    if not answer.choices:
        raise BackendProtocolError("the model's backend answered nothing")
    return answer


async def tell(
    request: Request,
    response: Response,
    story: Story,
    bytes_max: int,
    headers: tuple[tuple[str, str], ...] = (),
) -> None:
    """Stream the chat's answer as the story has it: one event in, its events out at once.

    However it ends, the client is told; the stream of a client that has gone is cancelled.
    """
    request.start(OK, (*EVENT_STREAM_HEADERS, *headers))
    try:
        end = await _tell(request, response, story, bytes_max)
    except asyncio.CancelledError:
        if request.connected:
            request.end(story.fail(failure_of(_DRAINING)))
        raise
    except UpstreamClosed:
        end = story.fail(failure_of(_BROKEN_OFF))
    except SLLMError as error:
        end = story.fail(failure_of(error))
    request.end(end)


async def _tell(request: Request, response: Response, story: Story, bytes_max: int) -> bytes:
    """Everything but the last events, which are returned."""
    usage: ChatUsage | None = None
    size_bytes = 0
    async for line in response.lines():
        if line.startswith(b":"):
            await request.write(line + b"\n\n")
            continue
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == _DONE:
            return story.end(usage)
        size_bytes += len(data)
        if size_bytes > bytes_max:
            raise BackendProtocolError(f"the answer is longer than {bytes_max} bytes")
        chunk = read_answer(data)
        if chunk.error is not None:
            return story.fail(Failure(status=0, error=chunk.error))
        usage = chunk.usage or usage
        if chunk.loading is not None:
            await request.write(story.wait(chunk.loading))
        elif chunk.choices:
            await request.write(story.take(chunk.choices[0]))
    raise _BROKEN_OFF


def _timing_lines(response: Response) -> bytes:
    """Where the time went, as the chat's answer says it."""
    lines = ""
    for name in ("openai-processing-ms", "server-timing"):
        value = response.headers.get(name)
        if value is not None:
            lines += f"{name}: {value}\r\n"
    return lines.encode("latin-1")
