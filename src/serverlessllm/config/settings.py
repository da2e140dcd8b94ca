"""All settings of a process: one frozen struct, one section a component.

A component's own options live with it (`<component>/settings.py`); here they only come together.
"""

from __future__ import annotations

import msgspec

from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.scheduler.settings import SchedulerSettings
from serverlessllm.store.settings import StoreSettings
from serverlessllm.telemetry.settings import TelemetrySettings


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole system. A key that is left out has the default shown here."""

    data_dir: str | None = None
    """Everything that survives a restart. auto: `serverlessllm` in the XDG data directory."""
    runtime_dir: str | None = None
    """Unix sockets; short, because a socket's path has at most 107 bytes. auto: a 0700 directory
    named for the user and the data directory, in XDG_RUNTIME_DIR or /tmp."""
    store_url: str | None = None
    """Where checkpoints are published: file:///folder, s3://bucket/folder, az://…, gs://….
    auto: the folder `store` in the data directory."""
    metadata_url: str | None = None
    """Where models, agents and jobs are registered: sqlite:///file. auto: `metadata.db` in the
    data directory."""

    orchestrator: OrchestratorSettings = OrchestratorSettings()
    agent: AgentSettings = AgentSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    loader: LoaderSettings = LoaderSettings()
    backends: BackendSettings = BackendSettings()
    ingest: IngestSettings = IngestSettings()
    store: StoreSettings = StoreSettings()
    metadata: MetadataSettings = MetadataSettings()
    edge: EdgeSettings = EdgeSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    limits: RequestLimits = RequestLimits()
    telemetry: TelemetrySettings = TelemetrySettings()
