"""One request to one instance: put in the engine's words, its answer made spec-complete."""

from __future__ import annotations

import itertools
import os

from serverlessllm.agent.answering import (
    pass_composed,
    pass_stream,
    pass_whole,
    respond_whole,
)
from serverlessllm.agent.instance import Instance
from serverlessllm.agent.operations import InstanceEngine
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.dialect import Composed, Operation, check_operation
from serverlessllm.core.agentapi import ANSWER_HEADER
from serverlessllm.core.clock import wall_s
from serverlessllm.core.errors import BackendDied, InvalidRequest, SLLMError
from serverlessllm.edge.relay import relay
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import UpstreamError, Upstreams
from serverlessllm.openai.answers import KINDS, Asked, Stamp, engine_body, read_asked
from serverlessllm.openai.errors import render_error, translate_backend_error
from serverlessllm.openai.sse import error_event

_OK = 200
_ERROR_STATUS_MIN = 400
_DIED_EVENT = error_event(BackendDied("the backend of this model died during the answer"))
_OPERATIONS = {operation.value: operation for operation in Operation}
_JSON = (("content-type", "application/json"),)

_name_prefix = os.urandom(9).hex()
_count = itertools.count(1)
"""Names an answer whose engine does not: the prefix is this process's own."""


def read_form(path: str, body: bytes) -> Asked | None:
    """The form that the answer must have; None: it passes as the engine gives it.

    Raises:
        InvalidJSON, InvalidRequest: nobody has checked the body.
    """
    kind = KINDS.get(path)
    return None if kind is None else read_asked(kind, body)


class Serving:
    """Asks instances. Holds nothing of its own."""

    def __init__(self, upstreams: Upstreams, settings: AgentSettings) -> None:
        self._upstreams = upstreams
        self._settings = settings

    async def serve(
        self, request: Request, instance: Instance, body: bytes, asked: Asked | None
    ) -> None:
        """Serve one request to its end.

        Raises:
            SLLMError: nothing was answered; another agent may be asked.
        """
        operation = _OPERATIONS.get(request.path)
        path = f"{request.path}?{request.query}" if request.query else request.path
        if operation is None:
            await self._forward(request, instance, path, body, None)
            return
        dialect = instance.dialect
        check_operation(dialect, operation)
        if asked is not None:
            body = engine_body(asked, body, instance.model, streams_usage=dialect.streams_usage)
        ask = dialect.translate(operation, body)
        if callable(ask):
            await self._compose(request, instance, operation, ask, asked)
        else:
            path = path if ask.path == operation else ask.path
            await self._forward(request, instance, path, ask.body, asked)

    async def _forward(
        self, request: Request, instance: Instance, path: str, body: bytes, asked: Asked | None
    ) -> None:
        head = b"content-type: %b\r\nx-request-id: %b\r\n" % (
            (request.headers.get("content-type") or "application/json").encode("latin-1"),
            request.id.encode(),
        )
        activity = instance.activity
        async with self._upstreams.send(
            instance.address, request.method, path, head, body
        ) as response:
            activity.answers.add(response)
            try:
                if response.status >= _ERROR_STATUS_MIN:
                    said = await response.read()
                    error = translate_backend_error(response.status, said, request.path)
                    request.respond(*render_error(error))
                elif asked is None:
                    await relay(request, response, error_event=_DIED_EVENT)
                elif asked.stream:
                    await pass_stream(request, response, asked, _stamp(request))
                else:
                    bytes_max = self._settings.answer_bytes_max
                    await pass_whole(request, response, asked, _stamp(request), bytes_max)
            finally:
                activity.answers.discard(response)
                activity.ended += 1

    async def _compose(
        self,
        request: Request,
        instance: Instance,
        operation: Operation,
        composed: Composed,
        asked: Asked | None,
    ) -> None:
        engine = InstanceEngine(
            instance, self._upstreams, operation, request.id, self._settings.answer_bytes_max
        )
        pieces = composed(engine)
        if asked is not None and asked.stream:
            await pass_composed(request, pieces, asked, _stamp(request))
            return
        try:
            body = b"".join([piece async for piece in pieces])
        except UpstreamError:
            raise
        except SLLMError as error:
            request.respond(*render_error(error))
            return
        if asked is None:
            request.respond(_OK, _JSON, body)
        else:
            await respond_whole(request, body, asked, _stamp(request))


def _stamp(request: Request) -> Stamp:
    promised = request.headers.get(ANSWER_HEADER)
    if promised is None:
        return Stamp(f"{_name_prefix}{next(_count):x}", wall_s())
    name, _, created_s = promised.partition(" ")
    if not (name and created_s.isdecimal()):
        raise InvalidRequest(f"header {ANSWER_HEADER}: a name and a Unix time")
    return Stamp(name, int(created_s), promised=True)
