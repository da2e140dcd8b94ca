"""What is known of one client request on its way through the hot path."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

from serverlessllm.core.errors import SLLMError
from serverlessllm.core.ids import AgentId, ModelId
from serverlessllm.edge.link import Link
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import Exchange
from serverlessllm.openai.request import ParsedRequest
from serverlessllm.orchestrator.rest.loading import Narrator, Wishes
from serverlessllm.orchestrator.rest.quota import Admission
from serverlessllm.orchestrator.router import Lease
from serverlessllm.orchestrator.timing import Timing

_NOBODY: Final[frozenset[AgentId]] = frozenset()


class Call:
    """One request from its parsing to its end."""

    # Defaults live on the class: a call is made for every request, and most keep them.
    status = 0
    """Of the agent's answer, once it is being relayed."""
    error: SLLMError | None = None
    """Of the last try."""
    tries = 0
    retrying = False
    lease: Lease | None = None
    """On the agent that it is being sent to, while no coroutine holds it."""
    exchange: Exchange | None = None
    """What has been sent there."""
    link: Link | None = None
    """Over which connection."""
    waits_until_s = 0.0
    """The end of what it waits for a load; 0: it has not met one."""
    narrator: Narrator | None = None
    """Tells its client of the load, if it is a stream that has met one."""
    admission: Admission | None = None
    """Of its key, if that has limits."""
    begun: asyncio.Future[None] | None = None
    """While its client is told how far the model's bytes are: done when no more is to be told, for
    its answer begins."""

    def __init__(
        self, request: Request, parsed: ParsedRequest, model: ModelId, body: bytes, wishes: Wishes
    ) -> None:
        self.gone = _NOBODY
        """Agents that did not answer."""
        self.refused = _NOBODY
        """Agents that are ready and did not take it."""
        self.request = request
        self.parsed = parsed
        self.model = model
        self.body = body
        self.wishes = wishes
        self.timing = Timing(model)
        request.state = self.timing

    def begin(self) -> None:
        """Something of its answer is passed on now, or it has ended."""
        if self.begun is not None and not self.begun.done():
            self.begun.set_result(None)

    @property
    def avoid(self) -> Collection[AgentId]:
        """Agents that need not be asked again."""
        return self.gone | self.refused if self.error is not None else ()
