"""What a client of a cold model may ask for, and what it sees until the model is ready."""

from __future__ import annotations

import math
import secrets

import msgspec

from serverlessllm.core.agentapi import ANSWER_HEADER, LoadEvent
from serverlessllm.core.clock import wall_s
from serverlessllm.core.errors import InvalidRequest, ModelLoading
from serverlessllm.core.ids import ModelId
from serverlessllm.edge.server import RequestHeaders
from serverlessllm.openai.errors import ErrorBody
from serverlessllm.openai.sse import Progress, comment, progress_chunk, progress_of
from serverlessllm.orchestrator.settings import OrchestratorSettings

__all__ = [
    "NO_WISHES",
    "PROGRESS_HEADER",
    "WAIT_HEADER",
    "LoadingBody",
    "Narrator",
    "Progress",
    "StillLoading",
    "Wishes",
    "loading_body",
    "read_wishes",
    "wait_budget_s",
]

WAIT_HEADER = "x-sllm-wait"
"""Seconds that the client will wait for a cold model; 0: answer at once."""
PROGRESS_HEADER = "x-sllm-progress"
"""How a stream tells of a load: `comment`, or `chunk` for clients that drop comments."""


class Wishes(msgspec.Struct, frozen=True):
    """What a request's headers say about waiting."""

    wait_s: float | None = None
    chunks: bool = False
    """Progress comes as chunks of an answer, not as comments."""


NO_WISHES = Wishes()


class StillLoading(ModelLoading):
    """The wait budget is over; says how far the load is."""

    def __init__(self, model: ModelId, progress: LoadEvent) -> None:
        eta_s = progress.eta_s
        super().__init__(
            f"the model {model} is still loading; the load goes on, ask again",
            retry_after_s=1.0 if eta_s is None else max(1.0, eta_s),
        )
        self.progress = progress


class LoadingBody(ErrorBody, frozen=True):
    """An error's body, and how far the load is."""

    loading: Progress


def loading_body(error: StillLoading, body: bytes) -> bytes:
    """`body` (the error's) with the `loading` object added."""
    fields = msgspec.json.decode(body, type=ErrorBody).error
    return msgspec.json.encode(LoadingBody(fields, progress_of(error.progress)))


def read_wishes(headers: RequestHeaders) -> Wishes:
    """What the client says about waiting.

    Raises:
        InvalidRequest: a header has no value that can be understood; `param` names it.
    """
    wait, progress = headers.get(WAIT_HEADER), headers.get(PROGRESS_HEADER)
    if wait is None and progress is None:
        return NO_WISHES
    kind = "comment" if progress is None else progress.strip().lower()
    if kind not in {"comment", "chunk"}:
        raise InvalidRequest("X-SLLM-Progress: write comment or chunk", param="X-SLLM-Progress")
    return Wishes(None if wait is None else _seconds(wait), kind == "chunk")


def wait_budget_s(wishes: Wishes, settings: OrchestratorSettings, *, stream: bool) -> float:
    """How long a request may be held: what its client says, within the limit."""
    if wishes.wait_s is None:
        return settings.wait_budget_s_max if stream else settings.wait_budget_s
    return min(wishes.wait_s, settings.wait_budget_s_max)


class Narrator:
    """Tells one stream how far the load of its model is, in the client's own way."""

    __slots__ = ("_chat", "_chunks", "_created_s", "_model", "_name", "agent_head")

    def __init__(self, wishes: Wishes, path: str, model: str) -> None:
        """`model` is what the client calls its model."""
        self._chunks = wishes.chunks
        self._chat = path.endswith("/chat/completions")
        self._model = model
        self._name = secrets.token_hex(12)
        self._created_s = wall_s()
        self.agent_head = b""
        """Header lines by which the agent gives its answer the names that the client has seen."""
        if self._chunks:
            self.agent_head = f"{ANSWER_HEADER}: {self._name} {self._created_s}\r\n".encode()

    def tell(self, event: LoadEvent) -> bytes:
        """The bytes to send."""
        if not self._chunks:
            return comment(event)
        return progress_chunk(
            event, chat=self._chat, name=self._name, created_s=self._created_s, model=self._model
        )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise InvalidRequest(
            "X-SLLM-Wait: write a number of seconds, 0 or more", param="X-SLLM-Wait"
        )
    return seconds
