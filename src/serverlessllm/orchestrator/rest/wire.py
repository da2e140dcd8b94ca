"""Bodies of the management API (`/api/*`), as a client of it may import them.

| route | body | answer |
|---|---|---|
| `GET /api/version` | | `Version` |
| `GET /api/models?after=&limit=` | | `ModelList` |
| `POST /api/models` | `ModelSpec` | 201 `ModelView` |
| `GET /api/models/{model}` | | `ModelView` |
| `DELETE /api/models/{model}` | | `Deleted` |
| `POST /api/load` | `LoadModel` | NDJSON of `LoadEvent` |
| `POST /api/unload` | `UnloadModel` | `Unloaded` |
| `POST /api/pull` | `PullModel` | NDJSON of `JobRecord` |
| `GET /api/explain/{model}` | | `Explained` |
| `GET /api/agents`, `GET /api/agents/{agent}` | | `AgentList`, `AgentView` |
| `GET /api/jobs`, `GET /api/jobs/{model}` | | `JobList`, `JobRecord` |
| `GET /api/keys` | | `KeyList` |
| `POST /api/keys` | `NewApiKey` | 201 `CreatedKey` |
| `DELETE /api/keys/{id or name}` | | `KeyView` |

A stream that fails after its first line ends with a line whose `error` is set.
"""

from __future__ import annotations

import msgspec

from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.apikeys import ApiKey, Scope
from serverlessllm.core.cluster import AgentRecord, CacheLevel, JobRecord, ModelOnAgent
from serverlessllm.core.ids import AgentId, KeyId, ModelId
from serverlessllm.core.models import CheckpointRef, ModelSpec
from serverlessllm.openai.request.fields import KeepAlive, ModelName


class Version(msgspec.Struct, frozen=True, kw_only=True):
    version: str


class PlacedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as one agent last reported it."""

    agent: AgentId
    suspect: bool
    """The agent is silent or failed a request of ours."""
    on_agent: ModelOnAgent


class LastLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The latest finished load of a model that went through this orchestrator."""

    agent: AgentId
    total_s: float
    """From the first waiter to ready."""
    predicted_s: float
    """What the scheduler expected of the load."""
    hops: tuple[HopTiming, ...]


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known about one model."""

    model: ModelId
    spec: ModelSpec
    checkpoint: CheckpointRef | None
    created_s: int
    placements: tuple[PlacedModel, ...]
    job: JobRecord | None
    last_load: LastLoad | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    models: tuple[ModelView, ...]
    next_after: ModelId | None = None
    """Pass as `after` for the next page; None: this was the last."""


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelId
    bytes_freed: int
    """In the store."""


class LoadModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: ModelName
    keep_alive: KeepAlive | None = None
    """Seconds, a duration (`5m`), 0, or -1."""


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: ModelName
    cache_level: CacheLevel = CacheLevel.DRAM
    """The nearest tier that keeps the bytes."""
    force: bool = False


class Unloaded(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelId
    agents: tuple[AgentId, ...]
    """Those that had something to unload."""


class PullModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Create the model if it is unknown, then bring its checkpoint into the store."""

    model: ModelName
    source: str | None = None
    """None: the registered spec's, or `hf://` and the name."""
    backend: str | None = None


class ScoreRow(msgspec.Struct, frozen=True, kw_only=True):
    """One agent in the scheduler's table: terms in seconds, their sum is `score`."""

    agent: AgentId
    chosen: bool
    eligible: bool
    reason: str
    """Why it cannot be chosen; empty otherwise."""
    cache_level: CacheLevel
    queue_len: int
    cache_term_s: float
    kv_term_s: float
    queue_term_s: float
    move_term_s: float
    score_s: float


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelId
    chosen: AgentId | None
    rows: tuple[ScoreRow, ...]


class AgentView(msgspec.Struct, frozen=True, kw_only=True):
    agent: AgentId
    heartbeat_age_s: float
    suspect: bool
    record: AgentRecord


class AgentList(msgspec.Struct, frozen=True, kw_only=True):
    agents: tuple[AgentView, ...]


class JobList(msgspec.Struct, frozen=True, kw_only=True):
    jobs: tuple[JobRecord, ...]


class KeyView(msgspec.Struct, frozen=True, kw_only=True):
    """What may be seen of an API key; times are Unix times, None: never, or no limit."""

    id: KeyId
    name: str
    scopes: tuple[Scope, ...]
    models: tuple[str, ...]
    """Names, or patterns with `*`; empty: all."""
    created_s: int
    expires_s: int | None
    revoked_s: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    requests_at_once: int | None


class CreatedKey(KeyView, frozen=True, kw_only=True):
    """A new API key; the only time that its text is seen."""

    key: str


class KeyList(msgspec.Struct, frozen=True, kw_only=True):
    keys: tuple[KeyView, ...]


def key_view(key: ApiKey) -> KeyView:
    """What may be seen of `key`."""
    return msgspec.convert(key, KeyView, from_attributes=True)


def created_key(key: ApiKey, text: str) -> CreatedKey:
    """A key that was made just now, with its text."""
    return CreatedKey(**msgspec.structs.asdict(key_view(key)), key=text)
