"""Orders to agents: load and unload, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from serverlessllm.core.agentapi import TOKEN_HEADER, LoadEvent, LoadRequest, UnloadRequest
from serverlessllm.core.cluster import JobError
from serverlessllm.core.errors import BackendProtocolError, SLLMError
from serverlessllm.core.failures import error_of
from serverlessllm.core.ids import Address
from serverlessllm.edge.upstream import (
    Response,
    UpstreamClosed,
    UpstreamProtocolError,
    Upstreams,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from serverlessllm.openai.errors import ErrorBody
from serverlessllm.orchestrator.loads import AgentLost
from serverlessllm.orchestrator.settings import OrchestratorSettings

_OK = 200
_events = msgspec.json.Decoder(LoadEvent)
_errors = msgspec.json.Decoder(ErrorBody)


class AgentClient:
    """What an orchestrator asks of agents beside serving requests."""

    def __init__(self, upstreams: Upstreams, settings: OrchestratorSettings, token: str) -> None:
        self._upstreams = upstreams
        self._settings = settings
        self._headers = ((TOKEN_HEADER, token), ("content-type", "application/json"))

    async def load(
        self, address: Address, request: LoadRequest, publish: Callable[[LoadEvent], None]
    ) -> LoadEvent:
        """The last `ready` event; each one before it is published. Of an instance that is ready
        while its bytes still move these are `ready` (`arriving`), then how far they are.
        Cancelling hangs up.

        Raises:
            AgentLost: it cannot be reached, hung up, or is silent for too long.
            SLLMError: its refusal, or why the load failed.
        """
        body = msgspec.json.encode(request)
        silence_s = self._settings.load_silence_s_max
        with _gone():
            async with (
                asyncio.timeout(silence_s) as silence,
                self._upstreams.send(address, "POST", "/load", self._headers, body) as response,
            ):
                if response.status != _OK:
                    raise await refusal(response)
                async for line in response.lines():
                    silence.reschedule(asyncio.get_running_loop().time() + silence_s)
                    event = _decoded(line)
                    if event.error is not None:
                        raise error_of(event.error)
                    if event.state == "ready" and not event.arriving:
                        return event
                    publish(event)
        raise AgentLost("the agent ended a load without an outcome")

    async def unload(self, address: Address, request: UnloadRequest) -> None:
        """Return when the model's instances have stopped.

        Raises:
            AgentLost: it cannot be reached, or hung up.
            SLLMError: its refusal.
        """
        body = msgspec.json.encode(request)
        timeout_s = self._settings.unload_s_max
        with _gone():
            async with self._upstreams.send(
                address, "POST", "/unload", self._headers, body, timeout_s=timeout_s
            ) as response:
                if response.status >= 300:
                    raise await refusal(response)
                await response.read()


@contextmanager
def _gone() -> Iterator[None]:
    """Whatever way an agent goes away is one error here."""
    try:
        yield
    except (UpstreamUnreachable, UpstreamClosed, UpstreamTimeout, TimeoutError) as error:
        raise AgentLost("the agent went away") from error
    except UpstreamProtocolError as error:
        raise BackendProtocolError("the agent's answer is not its protocol") from error


async def refusal(response: Response) -> SLLMError:
    """The error that an agent answered with."""
    try:
        fields = _errors.decode(await response.read()).error
    except msgspec.MsgspecError:
        return BackendProtocolError(f"the agent answered with status {response.status}")
    error = error_of(JobError(code=fields.code, message=fields.message, status=response.status))
    error.param = fields.param
    wait = response.headers.get("retry-after")
    if wait is not None and wait.isdecimal():
        error.retry_after_s = float(wait)
    return error


def _decoded(line: bytes) -> LoadEvent:
    try:
        return _events.decode(line)
    except msgspec.MsgspecError as error:
        raise BackendProtocolError("the agent's load event cannot be read") from error
