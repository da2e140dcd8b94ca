"""What a client of a cold model sees until it is ready."""

from __future__ import annotations

import math

import msgspec

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.errors import InvalidRequest, ModelLoading
from serverlessllm.core.ids import ModelId
from serverlessllm.openai.errors import ErrorBody
from serverlessllm.orchestrator.settings import OrchestratorSettings


class StillLoading(ModelLoading):
    """The wait budget is over; says how far the load is."""

    def __init__(self, model: ModelId, progress: LoadEvent) -> None:
        eta_s = progress.eta_s
        super().__init__(
            f"the model {model} is still loading; the load goes on, ask again",
            retry_after_s=1.0 if eta_s is None else max(1.0, eta_s),
        )
        self.progress = progress


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The `loading` object beside the error."""

    state: str
    stage: str
    bytes: int
    total: int | None
    eta_s: float | None


class LoadingBody(ErrorBody, frozen=True):
    """An error's body, and how far the load is."""

    loading: Progress


def loading_body(error: StillLoading, body: bytes) -> bytes:
    """`body` (the error's) with the `loading` object added."""
    event = error.progress
    progress = Progress(
        state=event.state,
        stage=event.stage,
        bytes=event.bytes_done,
        total=event.bytes_total,
        eta_s=event.eta_s,
    )
    fields = msgspec.json.decode(body, type=ErrorBody).error
    return msgspec.json.encode(LoadingBody(fields, progress))


def wait_budget_s(header: str | None, settings: OrchestratorSettings, stream: bool) -> float:
    """How long a request may be held: what its header says, within the limit.

    Raises:
        InvalidRequest: the header is not a number of seconds.
    """
    if header is None:
        return settings.wait_budget_s_max if stream else settings.wait_budget_s
    try:
        wanted_s = float(header)
    except ValueError:
        wanted_s = math.nan
    if not wanted_s >= 0:
        raise InvalidRequest("X-SLLM-Wait: write a number of seconds, 0 or more")
    return min(wanted_s, settings.wait_budget_s_max)
