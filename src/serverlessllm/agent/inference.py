"""The hot path: a request gets a slot of a ready instance, whose answer is made spec-complete."""

from __future__ import annotations

import math

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.instances import Instances
from serverlessllm.agent.serving import Serving, read_form
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.core.agentapi import KEEP_ALIVE_HEADER, MODEL_HEADER
from serverlessllm.core.errors import BackendDied, InvalidRequest, ModelNotReady, SLLMError
from serverlessllm.core.ids import ModelId
from serverlessllm.core.units import FOREVER_S
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import (
    UpstreamClosed,
    UpstreamError,
    Upstreams,
    UpstreamUnreachable,
)


class Inference:
    """`/v1/*`. Holds nothing of its own."""

    def __init__(self, instances: Instances, upstreams: Upstreams, settings: AgentSettings) -> None:
        self._instances = instances
        self._serving = Serving(upstreams, settings)
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
        asked = read_form(request.path, body)
        async with slots.lease(keep_alive_s) as instance:
            try:
                await self._serving.serve(request, instance, body, asked)
            except (UpstreamClosed, UpstreamUnreachable) as error:
                raise await self._why(instance, error) from None

    async def _why(self, instance: Instance, error: UpstreamError) -> SLLMError:
        """What the end of the backend's connection means, nothing having been answered: with its
        process gone the model is as good as never loaded here, and may be loaded again."""
        process = instance.process
        if process is not None and await process.ended_within(self._settings.death_notice_s):
            self._instances.died(instance)
            return ModelNotReady(f"the instance of {instance.model} died before it answered")
        return BackendDied(error.message)


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
