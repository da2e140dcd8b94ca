"""Models, agents, ingest jobs and API keys as typed records, over any adapter of the seam.

An epoch is the store's revision at which its owner registered: it rises with every registration,
outlives leases, and needs no counter of its own. Every rule that spans writers is decided by a
compare-and-swap on one key; nothing here is a lock.
"""

from serverlessllm.metadata.registry.changes import (
    AgentChanged,
    AgentLeft,
    ApiKeyChanged,
    ApiKeyGone,
    JobChanged,
    JobClaim,
    ModelChanged,
    ModelDeleted,
    Registration,
    RegistryChange,
    Resync,
    Snapshot,
    StoredModel,
)
from serverlessllm.metadata.registry.registry import Registry

__all__ = [
    "AgentChanged",
    "AgentLeft",
    "ApiKeyChanged",
    "ApiKeyGone",
    "JobChanged",
    "JobClaim",
    "ModelChanged",
    "ModelDeleted",
    "Registration",
    "Registry",
    "RegistryChange",
    "Resync",
    "Snapshot",
    "StoredModel",
]
