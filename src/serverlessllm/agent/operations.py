"""An instance's engine, as a dialect asks it where one answer takes several requests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from serverlessllm.agent.instance import Instance
from serverlessllm.backends.dialect import Operation
from serverlessllm.core.errors import BackendProtocolError
from serverlessllm.edge.upstream import Response, Upstreams
from serverlessllm.openai.errors import translate_backend_error

_ERROR_STATUS_MIN = 400
_DATA = b"data:"
_END = b"[DONE]"


class InstanceEngine:
    """`backends.dialect.Engine` of one instance, for the time of one client's request."""

    def __init__(
        self,
        instance: Instance,
        upstreams: Upstreams,
        operation: Operation,
        request_id: str,
        bytes_max: int,
    ) -> None:
        """`operation` is what the client asked for; `bytes_max`: of an answer that is not
        streamed."""
        self._instance = instance
        self._operation = operation
        self._bytes_max = bytes_max
        self._upstreams = upstreams
        self._head = b"content-type: application/json\r\nx-request-id: %b\r\n" % request_id.encode()

    async def ask(self, path: str, body: bytes) -> bytes:
        """POST; the body of a 2xx answer.

        Raises:
            SLLMError: the server refused or failed.
            UpstreamError: it went away.
        """
        async with self._send(path, body) as response:
            return await response.read(self._bytes_max)

    async def get(self, path: str) -> bytes:
        """GET; raises as `ask`."""
        async with self._send(path, b"", "GET") as response:
            return await response.read(self._bytes_max)

    async def stream(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """POST; the data of each server-sent event but `[DONE]`; raises as `ask`."""
        ended = False
        async with self._send(path, body) as response:
            async for line in response.lines():
                # Read on after the end: only a connection whose answer is done is used again.
                if ended or not line.startswith(_DATA):
                    continue
                data = line[len(_DATA) :].strip()
                if data == _END:
                    ended = True
                else:
                    yield data
        if not ended:
            raise BackendProtocolError("the model's backend ended its stream early")

    @contextlib.asynccontextmanager
    async def _send(self, path: str, body: bytes, method: str = "POST") -> AsyncIterator[Response]:
        activity = self._instance.activity
        async with self._upstreams.send(
            self._instance.address, method, path, self._head, body
        ) as response:
            activity.answers.add(response)
            try:
                if response.status >= _ERROR_STATUS_MIN:
                    said = await response.read()
                    raise translate_backend_error(response.status, said, self._operation)
                yield response
            finally:
                activity.answers.discard(response)
                activity.ended += 1
