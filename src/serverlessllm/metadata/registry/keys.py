"""The only place that spells keys."""

from __future__ import annotations

from serverlessllm.core.ids import AgentId, KeyId, ModelId

MODELS = "models/"
AGENTS = "agents/"
JOBS = "jobs/ingest/"
API_KEYS = "apikeys/"

JOB_EPOCHS = "epochs/ingest"
"""Put to take a number: the revision is a new job's epoch."""


def model_key(model: str) -> str:
    return f"{MODELS}{model}"


def alias_key(alias: str) -> str:
    """Holds the name of the model that the alias stands for."""
    return f"aliases/{alias}"


def agent_key(agent: AgentId) -> str:
    return f"{AGENTS}{agent}"


def agent_epoch_key(agent: AgentId) -> str:
    """Its revision is the epoch of the agent's newest registration; never leased."""
    return f"epochs/agents/{agent}"


def api_key_key(key: KeyId) -> str:
    return f"{API_KEYS}{key}"


def job_key(model: ModelId) -> str:
    return f"{JOBS}{model}"
