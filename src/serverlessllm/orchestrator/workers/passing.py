"""What a worker does not answer itself goes to the main process, and comes back as it is."""

from __future__ import annotations

from serverlessllm.core.errors import Draining, Unavailable
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.edge.relay import relay
from serverlessllm.edge.response import ResponseHeaders
from serverlessllm.edge.server import Request
from serverlessllm.edge.steps import in_task
from serverlessllm.edge.upstream import UpstreamError, Upstreams
from serverlessllm.openai.sse import error_event
from serverlessllm.orchestrator.timing import Timing

_NOT_PASSED_ON = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "origin",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
    }
)
"""Fields of one connection, and those that the worker has looked at: `Host`, `Origin`."""
_TIMING = ("openai-processing-ms", "server-timing")
_CUT_EVENT = error_event(Draining("the answer was cut off: send the request again"))


class Passing:
    """To the main process's front, over a unix socket."""

    def __init__(self, upstreams: Upstreams, front: Address) -> None:
        self._upstreams = upstreams
        self._front = front

    async def serve(self, request: Request, *, with_body: bool) -> None:
        """Ask the main process for the answer; a client that leaves takes the question back.
        Without its body the answer is a refusal, in the words of its route.

        Raises:
            Unavailable: it does not answer.
        """
        await in_task()
        body = await request.body() if with_body else b""
        path = f"{request.path}?{request.query}" if request.query else request.path
        headers = [(name, v) for name, v in request.headers.items() if name not in _NOT_PASSED_ON]
        headers.append(("x-request-id", request.id))
        try:
            async with self._upstreams.send(
                self._front, request.method, path, headers, body
            ) as response:
                request.state = _timed_by(response.headers)
                await relay(request, response, error_event=_CUT_EVENT)
        except UpstreamError as error:
            raise Unavailable("this server is starting or ending", retry_after_s=1.0) from error


def _timed_by(headers: ResponseHeaders) -> Timing:
    """Where the time went, as the main process says: the answer is its."""
    timing = Timing(ModelId(""))
    lines = [f"{name}: {value}\r\n" for name in _TIMING if (value := headers.get(name)) is not None]
    timing.inner = "".join(lines).encode("latin-1")
    return timing
