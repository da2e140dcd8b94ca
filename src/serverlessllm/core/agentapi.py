"""What orchestrator and agent say to each other over the agent's HTTP API.

`POST /load` takes a `LoadRequest` and answers with a stream of `LoadEvent`, one JSON a line;
the last one has `state` `ready` or `failed`. `POST /unload` takes an `UnloadRequest`.
`GET /status` answers with the `AgentRecord`.
"""

from __future__ import annotations

import msgspec

from serverlessllm.core.cluster import CacheLevel, JobError
from serverlessllm.core.ids import InstanceId, ModelId
from serverlessllm.core.models import CheckpointRef, ModelSpec

MODEL_HEADER = "x-sllm-model"
"""Canonical model id, so that the agent need not parse a relayed body."""
KEEP_ALIVE_HEADER = "x-sllm-keep-alive"
"""Seconds as decimal text; this request's own keep_alive."""
USAGE_HEADER = "x-sllm-usage"
"""`PROMPT COMPLETION` in tokens: of an agent's whole answer a header, of its stream a trailer."""
ANSWER_HEADER = "x-sllm-answer"
"""`NAME CREATED`: what a stream's chunks are called and when it was created (Unix time), where its
client has been told of a load in chunks of that name already."""
REFUSED_HEADER = "x-sllm-refused"
"""Set by an agent on an answer of its own (never a backend's): the error code. Nothing ran, so
the orchestrator may ask another agent."""
TOKEN_HEADER = "x-sllm-token"  # noqa: S105 - the header's name
"""The cluster token that orchestrators and agents prove themselves with."""


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Make a model ready (`cache_level` DEVICE) or only bring its bytes near (prefetch)."""

    spec: ModelSpec
    checkpoint: CheckpointRef | None = None
    cache_level: CacheLevel = CacheLevel.DEVICE
    keep_alive_s: float | None = None
    """Overrides the spec's until the next request says otherwise."""
    instances: int = 1
    """How many the agent shall run of it, within the spec's `max_replicas`."""


class UnloadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Stop the model's instances; drop its bytes down to `cache_level` (DRAM keeps both copies)."""

    model: ModelId
    cache_level: CacheLevel = CacheLevel.DRAM
    force: bool = False
    """Do not wait for running requests."""


class HopTiming(msgspec.Struct, frozen=True, kw_only=True):
    """One hop of a load: what moved, how long it took, what the hop could have done."""

    hop: str
    """`queue`, `store→nvme`, `store→dram`, `nvme→dram`, `dram→device`, `start`."""
    bytes_moved: int = 0
    seconds: float = 0.0
    first_s: float = 0.0
    """Of `seconds`: until the first chunk was there, checked; 0 where nothing moves."""
    limit_bytes_s: float | None = None
    """Measured limit of this hop on this node; None where nothing moves."""


class LoadEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the `/load` answer."""

    state: str
    """`queued`, `loading`, `starting`, `ready` or `failed`."""
    stage: str = ""
    """The hop that moves now, such as `nvme→dram`."""
    bytes_done: int = 0
    bytes_total: int | None = None
    eta_s: float | None = None
    """None rather than a guess."""
    instance: InstanceId | None = None
    hops: tuple[HopTiming, ...] = ()
    """On `ready`: the whole breakdown."""
    arriving: bool = False
    """On `ready`: its bytes still move, and `hops` say how far they are; `loading` follows as they
    come, and one more `ready` when they are there, or `failed`."""
    error: JobError | None = None
    """On `failed`."""
