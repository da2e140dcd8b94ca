"""What agents and ingest jobs report: the records that an orchestrator's view is made of."""

from __future__ import annotations

from enum import IntEnum, StrEnum

import msgspec

from serverlessllm.core.ids import Address, AgentId, CheckpointId, Epoch, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import SCHEMA_VERSION


class CacheLevel(IntEnum):
    """The best tier that holds a model's bytes on an agent: lower is nearer to the engine."""

    DEVICE = 0
    DRAM = 1
    NVME = 2
    STORE = 3

    @property
    def tier(self) -> str:
        """`device`, `dram`, `nvme` or `store`."""
        return self.name.lower()


class ModelOnAgent(msgspec.Struct, frozen=True, kw_only=True):
    """One model as one agent knows it."""

    model: ModelId
    checkpoint: CheckpointId | None = None
    cache_level: CacheLevel = CacheLevel.STORE
    """DEVICE only while an instance is ready."""
    state: InstanceState | None = None
    """Of its instance; None when there is none."""
    arriving: bool = False
    """It is ready, but bytes of it still move: requests wait inside it for what they need."""
    kv_hit_rate: float = 0.0
    """Share of prompt tokens that the backend found in its KV cache, 0..1."""
    queue_len: int = 0
    """Requests the agent holds for it: running and waiting."""
    slots: int = 1
    """Requests that its instances together run at once."""
    instances: int = 0
    expires_in_s: float | None = None
    """Idle time left; None: no instance, or kept for ever."""
    start_s: float | None = None
    """Learned: from bytes in DRAM to ready."""
    service_s: float | None = None
    """Learned: mean time of one request."""


class TierUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The budget of one tier, and how much of it is taken."""

    budget_bytes: int
    used_bytes: int
    pinned_bytes: int = 0
    """Of `used_bytes`: in use or pinned, so not to be evicted now."""


class AgentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`agents/<agent>` in the metadata store; leased; one write a heartbeat."""

    schema_version: int = SCHEMA_VERSION
    agent: AgentId
    epoch: Epoch
    address: Address
    accepting: bool = True
    """False while it drains."""
    backends: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    dram: TierUsage
    nvme: TierUsage
    bandwidth: dict[str, float] = {}
    """Measured bytes/s a hop: `store→nvme`, `nvme→dram`, `dram→device`."""
    models: tuple[ModelOnAgent, ...] = ()


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `registry.placements(model)`."""

    agent: AgentId
    cache_level: CacheLevel
    kv_hit_rate: float
    queue_len: int


class JobStage(StrEnum):
    """What an ingest job is doing."""

    RESOLVING = "resolving"
    CONVERTING = "converting"
    """Fetching, converting and publishing overlap: this one word is all three."""
    PUBLISHING = "publishing"
    """Only the rest of the upload and the `.idx` are left."""
    DONE = "done"
    FAILED = "failed"


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """An error of the contract as it is stored: `core.errors` class by its code."""

    code: str
    message: str
    status: int


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`jobs/ingest/<model>` in the metadata store; leased to its owner while it runs."""

    schema_version: int = SCHEMA_VERSION
    model: ModelId
    owner: str
    epoch: Epoch
    stage: JobStage
    bytes_done: int = 0
    bytes_total: int | None = None
    error: JobError | None = None
