"""What the main process and its workers say to each other, and how it is framed.

A worker is told the view once, then each change of it. What it meets itself goes back: an agent
that failed, a model that is not where it was, a wish for a load. A frame is its length in 4 bytes,
then MessagePack.
"""

from __future__ import annotations

import struct

import msgspec

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.apikeys import ApiKey
from serverlessllm.core.cluster import AgentRecord, JobError
from serverlessllm.core.ids import Address, AgentId, KeyId, ModelId
from serverlessllm.core.models import ModelRecord
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.coldstart import Loaded
from serverlessllm.orchestrator.rest.quota import Spent
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.scheduler.settings import SchedulerSettings
from serverlessllm.telemetry.figures import Figures
from serverlessllm.telemetry.settings import TelemetrySettings

_HEAD = struct.Struct("<I")
HEAD_BYTES = _HEAD.size
FRAME_BYTES_MAX = 256 * 1024 * 1024
"""Of one message: more is a bug, not a big cluster."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Any of them."""


# To a worker.


class Start(Message, frozen=True, kw_only=True):
    """The first message: all that a worker is made of. It holds the token: it is never logged."""

    number: int
    """Of the worker, from 0: for its log."""
    listen: Address
    """What clients are told, port included."""
    listeners: tuple[int, ...]
    """Inherited descriptors of sockets that are bound to it."""
    front: Address
    """Where the main process takes what is not for a worker."""
    token: str
    settings: OrchestratorSettings
    edge: EdgeSettings
    upstream: UpstreamSettings
    limits: RequestLimits
    scheduler: SchedulerSettings
    telemetry: TelemetrySettings


class ModelIs(Message, frozen=True, kw_only=True):
    record: ModelRecord


class ModelGone(Message, frozen=True, kw_only=True):
    model: ModelId


class AgentIs(Message, frozen=True, kw_only=True):
    """`view.AgentSeen`, as far as requests look at it."""

    record: AgentRecord
    revision: int
    seen_s: float
    """On the monotonic clock, which all processes of a machine share."""
    failed: bool


class AgentGone(Message, frozen=True, kw_only=True):
    agent: AgentId


class KeyIs(Message, frozen=True, kw_only=True):
    key: ApiKey


class KeyGone(Message, frozen=True, kw_only=True):
    key: KeyId


class KeysKnown(Message, frozen=True, kw_only=True):
    """What is known of keys as such: see the fields of the view."""

    listed: bool
    keys_asked: bool


class Snapshot(Message, frozen=True, kw_only=True):
    """The whole view: what a worker knew before and is not here is gone."""

    models: tuple[ModelRecord, ...]
    agents: tuple[AgentIs, ...]
    api_keys: tuple[ApiKey, ...]
    known: KeysKnown


class LoadGoes(Message, frozen=True, kw_only=True):
    """A wished load has come so far."""

    wish: int
    event: LoadEvent


class LoadReady(Message, frozen=True, kw_only=True):
    """The model is ready, though perhaps not `whole`: its bytes still move."""

    wish: int
    loaded: Loaded
    whole: bool


class LoadFailed(Message, frozen=True, kw_only=True):
    """It will not be ready."""

    wish: int
    error: JobError
    param: str | None
    retry_after_s: float | None


class AskFigures(Message, frozen=True, kw_only=True):
    """Answered by `FiguresAre`."""


class RenewCertificate(Message, frozen=True, kw_only=True):
    """The files of the certificate have changed, and are good."""


class Drain(Message, frozen=True, kw_only=True):
    """As SIGTERM to the worker, but for its farewell: nobody takes its place."""


# Both ways.


class KeysSpent(Message, frozen=True, kw_only=True):
    """What keys spent of their limits in other processes since the last time."""

    spent: dict[KeyId, Spent]


# From a worker.


class Listening(Message, frozen=True, kw_only=True):
    """Clients are served."""


class CannotStart(Message, frozen=True, kw_only=True):
    """It ends: what its settings ask for cannot be had."""

    reason: str


class Alive(Message, frozen=True, kw_only=True):
    """Now and then, so that one that hangs is told from one that has nothing to say."""


class AgentFailed(Message, frozen=True, kw_only=True):
    """It did not answer a request."""

    agent: AgentId


class ModelLost(Message, frozen=True, kw_only=True):
    """The agent answered that it has no ready instance."""

    agent: AgentId
    model: ModelId


class NotReady(Message, frozen=True, kw_only=True):
    """The instance whose bytes still moved is gone."""

    agent: AgentId
    model: ModelId


class Wish(Message, frozen=True, kw_only=True):
    """Have a model loaded; answered by `LoadGoes`, many times, then `LoadReady` (twice, when the
    instance was ready before its bytes), or `LoadFailed`."""

    wish: int
    """A number of the worker's."""
    model: ModelId
    elsewhere: bool
    """On an agent where it is not ready yet."""


class Unwished(Message, frozen=True, kw_only=True):
    """Nobody at the worker wants that load any more."""

    wish: int


class FiguresAre(Message, frozen=True, kw_only=True):
    """All its metrics, since it began."""

    figures: Figures


class Leaving(Message, frozen=True, kw_only=True):
    """It was told to end by somebody else: it takes connections a little longer, then finishes
    what runs. Another one may take its place now."""


ToWorker = (
    Start
    | Snapshot
    | ModelIs
    | ModelGone
    | AgentIs
    | AgentGone
    | KeyIs
    | KeyGone
    | KeysKnown
    | KeysSpent
    | LoadGoes
    | LoadReady
    | LoadFailed
    | AskFigures
    | RenewCertificate
    | Drain
)
FromWorker = (
    Listening
    | CannotStart
    | Alive
    | AgentFailed
    | ModelLost
    | NotReady
    | Wish
    | Unwished
    | KeysSpent
    | FiguresAre
    | Leaving
)

_encoder = msgspec.msgpack.Encoder()


def frame(message: ToWorker | FromWorker) -> bytes:
    """The message as it is sent."""
    body = _encoder.encode(message)
    return _HEAD.pack(len(body)) + body


def body_bytes(head: bytes | bytearray) -> int:
    """How long the frame is that begins with `head`.

    Raises:
        ValueError: longer than any message is.
    """
    (size,) = _HEAD.unpack_from(head)
    if size > FRAME_BYTES_MAX:
        raise ValueError(f"a frame of {size} bytes")
    return int(size)
