"""The hot path: a request gets a slot of a ready instance, whose answer is made spec-complete."""

from __future__ import annotations

import itertools
import math
import os

from serverlessllm.agent.answering import (
    pass_composed,
    pass_stream,
    pass_whole,
    respond_whole,
)
from serverlessllm.agent.instance import Instance
from serverlessllm.agent.instances import Instances
from serverlessllm.agent.operations import InstanceEngine
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.dialect import Composed, Operation, check_operation
from serverlessllm.core.agentapi import KEEP_ALIVE_HEADER, MODEL_HEADER
from serverlessllm.core.clock import wall_s
from serverlessllm.core.errors import (
    BackendDied,
    InvalidRequest,
    ModelNotReady,
    SLLMError,
)
from serverlessllm.core.ids import ModelId
from serverlessllm.core.units import FOREVER_S
from serverlessllm.edge.relay import relay
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import (
    UpstreamClosed,
    UpstreamError,
    Upstreams,
    UpstreamUnreachable,
)
from serverlessllm.openai.answers import KINDS, Asked, Stamp, engine_body, read_asked
from serverlessllm.openai.errors import render_error, translate_backend_error
from serverlessllm.openai.sse import error_event

_ERROR_STATUS_MIN = 400
_DIED = "the backend of this model died during the answer"
_DIED_EVENT = error_event(BackendDied(_DIED))
_OPERATIONS = {operation.value: operation for operation in Operation}
_JSON = (("content-type", "application/json"),)

_name_prefix = os.urandom(9).hex()
_count = itertools.count(1)
"""Names an answer whose engine does not: the prefix is this process's own."""


class Inference:
    """`/v1/*`. Holds nothing of its own."""

    def __init__(self, instances: Instances, upstreams: Upstreams, settings: AgentSettings) -> None:
        self._instances = instances
        self._upstreams = upstreams
        self._settings = settings

    async def answer(self, request: Request) -> None:
        """Serve one request to its end.

        Raises:
            SLLMError: nothing was answered; another agent may be asked.
        """
        model = request.headers.get(MODEL_HEADER)
        if model is None:
            raise InvalidRequest(f"header {MODEL_HEADER} is missing")
        keep_alive_s = _keep_alive_s(request.headers.get(KEEP_ALIVE_HEADER))
        slots = self._instances.slots(ModelId(model))
        if slots is None:
            raise ModelNotReady("the model is not ready on this agent")
        body = await request.body()
        kind = KINDS.get(request.path)
        asked = None if kind is None else read_asked(kind, body)
        async with slots.lease(keep_alive_s) as instance:
            try:
                await self._serve(request, instance, body, asked)
            except (UpstreamClosed, UpstreamUnreachable) as error:
                raise await self._why(instance, error) from None

    async def _serve(
        self, request: Request, instance: Instance, body: bytes, asked: Asked | None
    ) -> None:
        """In the engine's own words, or by several requests to it."""
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
            await self._compose(request, instance, ask, asked)
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
                    error = translate_backend_error(response.status, await response.read())
                    request.respond(*render_error(error))
                elif asked is None:
                    await relay(request, response, error_event=_DIED_EVENT)
                elif asked.stream:
                    await pass_stream(request, response, asked, _stamp())
                else:
                    bytes_max = self._settings.answer_bytes_max
                    await pass_whole(request, response, asked, _stamp(), bytes_max)
            finally:
                activity.answers.discard(response)
                activity.ended += 1

    async def _compose(
        self, request: Request, instance: Instance, composed: Composed, asked: Asked | None
    ) -> None:
        pieces = composed(InstanceEngine(instance, self._upstreams, request.id))
        if asked is not None and asked.stream:
            await pass_composed(request, pieces, asked, _stamp())
            return
        try:
            body = b"".join([piece async for piece in pieces])
        except UpstreamError:
            raise
        except SLLMError as error:
            request.respond(*render_error(error))
            return
        if asked is None:
            request.respond(200, _JSON, body)
        else:
            respond_whole(request, body, asked, _stamp())

    async def _why(self, instance: Instance, error: UpstreamError) -> SLLMError:
        """What the end of the backend's connection means, nothing having been answered: with its
        process gone the model is as good as never loaded here, and may be loaded again."""
        process = instance.process
        if process is not None and await process.ended_within(self._settings.death_notice_s):
            self._instances.died(instance)
            return ModelNotReady(f"the instance of {instance.model} died before it answered")
        return BackendDied(error.message)


def _stamp() -> Stamp:
    return Stamp(f"{_name_prefix}{next(_count):x}", wall_s())


def _keep_alive_s(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if seconds == FOREVER_S or 0 <= seconds < math.inf:
        return seconds
    raise InvalidRequest(f"header {KEEP_ALIVE_HEADER}: seconds, 0, or -1 for ever")
