"""What can be set about an orchestrator."""

from __future__ import annotations

import re

import msgspec

from serverlessllm.core.ids import Address
from serverlessllm.core.units import KIB, MIB

WORKERS_MAX = 256
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


class OrchestratorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults follow the fault table; each bound is here and nowhere else."""

    listen: Address = Address("http://127.0.0.1:8000")
    """Where clients are served."""
    workers: int = 1
    """Processes that serve `listen` together; 1: this one alone, 0: one a core. More than one is
    for front doors that a core is not enough for."""
    api_key_sha256: tuple[str, ...] = ()
    """Hex SHA-256 of API keys that may do everything, beside those of `sllm key`."""
    require_key: bool | None = None
    """Whether every request needs an API key. auto: as soon as there is one."""
    allow_public_without_key: bool = False
    """Serve an address that other machines reach although there is no API key."""
    accept_commands: bool | None = None
    """Whether a model made over HTTP may name a `command`, which agents then run. auto: only while
    nobody but this machine reaches `listen`."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a `Host` header may carry beside IP addresses and `localhost`."""
    tls_certificate: str | None = None
    """File with the certificate chain (PEM) to serve https with; read again on SIGHUP."""
    tls_key: str | None = None
    """File with the certificate's private key (PEM)."""
    on_demand_sources: tuple[str, ...] = ("hf",)
    """URL schemes from which an unregistered model may be ingested on its first request."""

    wait_budget_s: float = 60.0
    """How long a non-streaming request waits for a cold model, unless `X-SLLM-Wait` says so."""
    wait_budget_s_max: float = 600.0
    """The longest wait that a client may ask for, and the bound for streams."""
    comment_interval_s: float = 4.0
    """Between two progress comments to a streaming client; the contract is at most 5."""
    waiters_per_model_max: int = 1024
    """Requests that may wait for one cold model."""
    waiters_max: int = 4096
    """Requests that may wait for cold models in this process."""
    loads_max: int = 64
    """Models that may be loading at once on behalf of this process."""
    agent_wait_s: float = 5.0
    """How long a load waits for an agent to appear when there is none."""
    stream_grace_s: float = 0.1
    """How long a stream for a cold model may stay silent: what fails sooner has its own status."""
    failure_cache_s: float = 5.0
    """How long a failed load answers for the next ones."""
    load_agents_max: int = 3
    """Agents asked for one load before it counts as failed."""
    load_silence_s_max: float = 10.0
    """The longest silence of an agent inside one load (it speaks every second)."""
    unload_s_max: float = 150.0
    """How long an agent may take to unload: its running answers finish first."""
    replicas_interval_s: float = 5.0
    """Between two looks for missing replicas (`min_replicas`) while nothing changes."""

    retries_max: int = 2
    """Other agents asked for one request before its first byte."""
    retry_share: float = 0.2
    """Retries allowed at once, as a share of the requests in flight."""
    retry_min: int = 3
    """Retries allowed at once however few requests are in flight."""
    retry_jitter_s: float = 0.02
    """The longest random pause before a retry."""

    list_interval_s: float = 30.0
    """Between two full lists that correct the watch."""
    list_timeout_s: float = 2.0
    """How long the first list at start may take before serving from nothing."""
    reconnect_s_max: float = 5.0
    """The longest pause before the metadata store is tried again."""
    agent_silent_s: float = 3.0
    """A heartbeat older than this makes its agent suspect."""
    agent_probe_after_s: float = 2.0
    """A heartbeat older than this makes us ask the agent itself, while it has requests of ours."""
    agent_probe_s_max: float = 1.0
    """How long it may take to answer then, before its requests are taken away."""

    idempotency_ttl_s: float = 3600.0
    """How long an answer to a request with an `Idempotency-Key` is kept to be given again."""
    idempotency_keys_max: int = 4096
    """Such answers that are kept at once, the newest."""
    idempotency_bytes_max: int = 64 * MIB
    """Their bytes together."""
    idempotency_answer_bytes_max: int = 4 * MIB
    """A longer answer is not kept."""

    responses_max: int = 4096
    """Stored responses (`/v1/responses`); the least recently used ones make room."""
    responses_bytes_max: int = 64 * MIB
    """What stored responses may take together."""
    responses_ttl_s: float = 86_400.0
    """How long a response is stored."""
    conversation_bytes_max: int = 16 * MIB
    """Stored items that one request goes on from, or refers to, each time that it does."""
    translated_bytes_max: int = 64 * MIB
    """Of one chat's answer that is told in another dialect (`/v1/responses`, `/v1/messages`)."""

    models_list_max: int = 1000
    """Rows of one listing."""
    hint_names_max: int = 8
    """Registered names mentioned to a client that asked for an unknown one."""
    drain_finish_s: float = 120.0
    """After SIGTERM: how long running answers may take to finish."""

    grpc_listen: Address | None = None
    """Where gRPC is served, with this server's keys and certificate; none: nowhere."""
    grpc_connections_max: int = 1024
    """Open gRPC connections; the next one is closed."""
    grpc_calls_max: int = 2048
    """Calls at once; the next one is RESOURCE_EXHAUSTED."""
    grpc_unread_calls_max: int = 2048
    """Calls that have ended, and whose clients do not read that: beside `grpc_calls_max`."""
    grpc_calls_per_connection_max: int = 256
    """Calls at once on one connection; the client holds back the next one."""
    grpc_requests_per_stream_max: int = 16
    """Requests of one `ModelStreamInfer` that run at once; the next one waits in the connection."""
    grpc_health_watchers_max: int = 256
    """Calls of `Health.Watch` at once: they are the ones that need no key."""
    grpc_message_bytes_max: int = 5 * MIB
    """Of one message from a client: a body (`edge.body_bytes_max`) and what is around it."""
    grpc_answer_bytes_max: int = 64 * MIB
    """Of one answer that is not a stream."""
    grpc_metadata_bytes_max: int = 16 * KIB
    """Of a call's metadata."""
    grpc_handshake_s_max: float = 10.0
    """Until a connection stands."""
    grpc_idle_s_max: float = 300.0
    """A connection without calls is closed after this."""
    grpc_keepalive_s: float = 60.0
    """A connection on which nothing comes for so long is asked whether it lives."""
    grpc_keepalive_s_max: float = 20.0
    """How long that may take; then its calls are cancelled."""
    grpc_ping_interval_s_min: float = 10.0
    """A client that asks that more often is disconnected."""
    grpc_watch_interval_s: float = 0.1
    """The least time between two statuses to one watcher of a model."""

    worker_start_s_max: float = 60.0
    """How long a worker may take to listen before it counts as crashed."""
    worker_restart_s_min: float = 0.5
    """The pause after a worker's second crash in a row (the first has none); it doubles."""
    worker_restart_s_max: float = 30.0
    """The longest pause before a worker is started again."""
    worker_silent_s_max: float = 20.0
    """A worker that says nothing for so long hangs: it is killed, and another one started."""
    worker_share_s: float = 0.1
    """How often workers tell each other what keys have spent of their limits."""
    worker_figures_s_max: float = 1.0
    """How long `/metrics` waits for a worker's figures before it shows the last known."""

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= WORKERS_MAX:
            raise ValueError(f"workers: from 0 (one a core) to {WORKERS_MAX}")
        if not all(_SHA256.fullmatch(digest) for digest in self.api_key_sha256):
            # Never shown: it may be the key itself.
            raise ValueError(
                "api_key_sha256: each is the SHA-256 of a key, 64 hex digits "
                "(printf %s KEY | sha256sum)"
            )
        if self.require_key is False and self.api_key_sha256:
            raise ValueError("api_key_sha256 names keys, and require_key = false asks for none")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: set both, or neither")
