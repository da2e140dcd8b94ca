"""Every metric of the project. A name carries its unit; labels are bounded (see `metrics`)."""

from __future__ import annotations

from serverlessllm.telemetry.metrics import Counter, Gauge, Histogram

BYTES = tuple(float(4**n * 1024) for n in range(13))
"""1 KiB to 16 GiB."""

# Every span
SPAN_SECONDS = Histogram(
    "sllm_span_seconds", "Duration of a stage; outcome: ok, error, cancelled", ("span", "outcome")
)

# Orchestrator
REQUESTS = Counter("sllm_requests_total", "Requests answered", ("route", "model", "status"))
REQUESTS_RUNNING = Gauge("sllm_requests_running", "Requests being answered", ("route",))
REQUESTS_WAITING = Gauge("sllm_requests_waiting", "Requests that wait for a model", ("model",))
REQUEST_SECONDS = Histogram(
    "sllm_request_seconds", "Arrival to the answer's last byte", ("route", "model")
)
TTFT_SECONDS = Histogram(
    "sllm_time_to_first_token_seconds",
    "Arrival to the answer's first byte; start: cold or warm",
    ("model", "start"),
)
REQUEST_RETRIES = Counter(
    "sllm_request_retries_total", "Requests sent to another agent", ("reason",)
)
TOKENS = Counter(
    "sllm_tokens_total", "Tokens of answers; kind: prompt or completion", ("model", "kind")
)
CLIENTS_GONE = Counter("sllm_clients_gone_total", "Clients that left before the end", ("route",))
SCHEDULE_ERROR_SECONDS = Histogram(
    "sllm_schedule_error_seconds",
    "Actual minus predicted time to first token, absolute; side: early, late",
    ("side",),
)
SCHEDULE_DECISIONS = Counter(
    "sllm_schedule_decisions_total", "Agents chosen, by the tier the model lay in", ("tier",)
)
AGENTS = Gauge("sllm_agents", "Agents in the view", ("state",))
WORKERS = Gauge("sllm_workers", "Processes that serve the port for one", ("state",))
WORKER_CRASHES = Counter("sllm_worker_crashes_total", "Such processes that ended unasked")

# Agent
INSTANCES = Gauge("sllm_instances", "Instances on this agent", ("model", "state"))
INSTANCE_FAILURES = Counter("sllm_instance_failures_total", "Failed instances", ("model", "code"))
QUEUE_LEN = Gauge("sllm_queue_requests", "Requests an agent holds for a model", ("model",))
HEARTBEATS = Counter("sllm_heartbeats_total", "Heartbeats written", ("outcome",))

# Loader
LOADS = Counter("sllm_loads_total", "Loads finished", ("outcome",))
LOAD_BYTES = Counter("sllm_load_bytes_total", "Bytes moved over a hop", ("hop",))
HOP_SECONDS = Histogram("sllm_load_hop_seconds", "Time of one hop of one load", ("hop",))
HOP_BANDWIDTH = Gauge("sllm_hop_bandwidth_bytes_per_second", "Measured bandwidth", ("hop",))
TIER_USED_BYTES = Gauge("sllm_tier_used_bytes", "Bytes taken in a tier", ("tier",))
TIER_BUDGET_BYTES = Gauge("sllm_tier_budget_bytes", "Bytes a tier may take", ("tier",))
EVICTIONS = Counter("sllm_evictions_total", "Checkpoints evicted", ("tier",))
CORRUPT_CHUNKS = Counter("sllm_corrupt_chunks_total", "Chunks whose digest was wrong", ("hop",))

# Ingestion and store
INGESTS = Counter("sllm_ingests_total", "Ingest jobs finished", ("outcome",))
INGEST_BYTES = Counter("sllm_ingest_bytes_total", "Bytes converted and published")
STORE_RETRIES = Counter("sllm_store_retries_total", "Store calls tried again", ("reason",))

# Metadata
METADATA_FAILURES = Counter(
    "sllm_metadata_failures_total", "Metadata calls that failed", ("verb", "reason")
)
RECORDS_REFUSED = Counter(
    "sllm_metadata_records_refused_total", "Records that this version cannot read", ("kind",)
)
