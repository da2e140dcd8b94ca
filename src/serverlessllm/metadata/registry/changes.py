"""What the registry hands out: stored models, handles of owners, snapshots, typed changes."""

from __future__ import annotations

import msgspec

from serverlessllm.core.apikeys import ApiKey
from serverlessllm.core.cluster import AgentRecord, JobRecord
from serverlessllm.core.ids import AgentId, CheckpointId, Epoch, KeyId, ModelId
from serverlessllm.core.models import ModelRecord
from serverlessllm.metadata.base import LeaseId, Revision


class StoredModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model's record and the revision it was read at (for `expect_revision`)."""

    record: ModelRecord
    revision: Revision


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All that is registered, true at one revision: `watch(snapshot.revision)` goes on from it.

    Records that this version cannot read are left out of the tuples and named in `unreadable`.
    """

    models: tuple[StoredModel, ...]
    agents: tuple[AgentRecord, ...]
    jobs: tuple[JobRecord, ...]
    api_keys: tuple[ApiKey, ...] = ()
    revision: Revision
    unreadable: tuple[str, ...] = ()


class Registration(msgspec.Struct, kw_only=True):
    """An agent's claim to its id, for `write_agent`; belongs to the one task that beats its heart.

    `written` is the revision of its last record, kept by the registry.
    """

    agent: AgentId
    epoch: Epoch
    lease: LeaseId
    ttl_s: float
    written: Revision


class JobClaim(msgspec.Struct, kw_only=True):
    """The ownership of one ingest job; belongs to the one task that runs it.

    `model_revision` and `checkpoint` are what the model's record was when the job was claimed
    (ABSENT and None: there was none): publishing compares with them. `written` is the revision of
    the job's last record, kept by the registry.
    """

    model: ModelId
    owner: str
    epoch: Epoch
    lease: LeaseId
    ttl_s: float
    written: Revision
    model_revision: Revision
    checkpoint: CheckpointId | None


class ModelChanged(msgspec.Struct, frozen=True, kw_only=True):
    """A model was put."""

    model: StoredModel
    revision: Revision


class ModelDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A model was deleted."""

    model: ModelId
    revision: Revision


class AgentChanged(msgspec.Struct, frozen=True, kw_only=True):
    """An agent wrote its record: a heartbeat."""

    agent: AgentRecord
    revision: Revision


class AgentLeft(msgspec.Struct, frozen=True, kw_only=True):
    """A registration ended: the agent left, its lease ran out, or a newer one replaced it."""

    agent: AgentId
    revision: Revision


class JobChanged(msgspec.Struct, frozen=True, kw_only=True):
    """An ingest job made progress, ended (`job.stage` says so), or lost its owner (`job` None)."""

    model: ModelId
    job: JobRecord | None
    revision: Revision


class ApiKeyChanged(msgspec.Struct, frozen=True, kw_only=True):
    """An API key was made or revoked."""

    api_key: ApiKey
    revision: Revision


class ApiKeyGone(msgspec.Struct, frozen=True, kw_only=True):
    """A key that had been revoked long ago was forgotten."""

    id: KeyId
    revision: Revision


class Resync(msgspec.Struct, frozen=True, kw_only=True):
    """Changes were missed: take a snapshot, forget nothing that still answers."""

    revision: Revision


RegistryChange = (
    ModelChanged
    | ModelDeleted
    | AgentChanged
    | AgentLeft
    | JobChanged
    | ApiKeyChanged
    | ApiKeyGone
    | Resync
)
