"""What can be set about an agent: every bound of its queues, waits and retries."""

from __future__ import annotations

import msgspec

from serverlessllm.core.ids import Address
from serverlessllm.core.units import MIB


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One agent: its instances, its queues and its place in the cluster."""

    id: str | None = None
    """Name in the cluster. auto: the host's name."""
    listen: Address | None = None
    """Where orchestrators reach it. auto: a unix socket in the runtime directory."""
    advertise: Address | None = None
    """The address it is known by, when that is not the one it listens on."""

    keep_alive_s: float = 300.0
    """Idle time before an instance unloads, where the model does not say; -1: never."""
    first_use_s: float = 10.0
    """How long a fresh instance is kept for its first request, whatever its keep_alive."""
    memory_budget_bytes: int | None = None
    """Memory for all instances beside their weights. auto: half of what is available at start."""
    cpus: int | None = None
    """Cores an instance may use. auto: those this process may run on."""
    instances_max: int = 64
    """Backend processes at once."""
    queue_factor: float = 8.0
    """Requests that may wait for a model, as a multiple of its slots."""
    queue_wait_s_max: float = 60.0
    """Longest wait for a slot before the request is refused."""
    room_wait_s_max: float = 10.0
    """Longest wait of a load for others to become idle when memory is short."""
    loads_max: int = 8
    """Checkpoints brought near at once; the rest wait in order."""
    loads_queued_max: int = 256
    """Loads that may wait for their turn."""
    load_s_max: float = 1800.0
    """Longest time from a load's acceptance to ready."""
    failure_cache_s: float = 5.0
    """How long a failed load answers for the next ones."""
    event_interval_s: float = 0.1
    """Least time between two lines of a `/load` answer."""
    event_silence_s_max: float = 1.0
    """Most time between two lines of a `/load` answer."""

    answer_bytes_max: int = 64 * MIB
    """Of an answer that is not streamed; embeddings are the long ones. More is a protocol error."""
    death_notice_s: float = 0.1
    """How soon after its connection a dead backend's end is noticed; a backend that lives on has
    only hung up."""
    restart_s_min: float = 0.5
    """Pause after a crash before the model is started again; doubles with each."""
    restart_s_max: float = 30.0
    """Longest such pause."""
    crash_window_s: float = 60.0
    """Crashes are counted over this time."""
    crashes_max: int = 5
    """So many crashes in the window, and the model is refused until the window has passed."""

    hang_s_min: float = 10.0
    """Silence of a busy instance before it is suspected to hang, at least."""
    hang_gap_factor: float = 20.0
    """The same as a multiple of the 99th percentile of its gaps between two chunks."""
    hang_s_max: float = 300.0
    """Silence that no sign of work excuses."""
    hang_cpu_share: float = 0.05
    """Of one core: what a silent instance must use between two looks to count as working."""
    watch_interval_s: float = 1.0
    """Between two looks at a busy instance."""
    stats_interval_s: float = 2.5
    """Between two readings of a busy instance's own figures. Whatever llama.cpp answers puts its
    look for departed clients (once a second) off, so this is longer."""
    stats_timeout_s: float = 2.0
    """How long an instance may take to tell its figures."""

    heartbeat_s: float = 1.0
    """Between two heartbeats; a change of state sends one at once."""
    lease_ttl_s: float = 10.0
    """How long the cluster keeps the record of an agent that no longer speaks."""
    catalog_interval_s: float = 30.0
    """Between two readings of the registered models, which give names to checkpoints on disk."""
    reconnect_s_max: float = 5.0
    """Longest pause before the metadata store is tried again."""

    task_restart_s: float = 1.0
    """Pause before a background task that a bug has ended is started again."""
    drain_finish_s: float = 120.0
    """After SIGTERM: how long running answers may take to finish."""
    chunks_max: int = 4
    """Answers of `GET /chunks` at once: each holds one chunk (16 MiB) in memory."""
