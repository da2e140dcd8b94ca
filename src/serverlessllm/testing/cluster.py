"""A whole cluster in one process and one directory: an orchestrator and N agents.

All parts are the real ones (SQLite, folder store, ingestion, loader, supervised backends, HTTP on
unix sockets); only the machine is small. Every agent has its own connection to the metadata store
and its own tiers on the shared directory's disks, as separate processes would.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from serverlessllm.agent.app import Agent
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.registry import Backends
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import Address, AgentId
from serverlessllm.core.units import GIB, MIB
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.ingest.service import Ingestion
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.loader.service import Loader
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.metadata.registry import Registry
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.metadata.sqlite import SqliteMetadata
from serverlessllm.orchestrator.app import Orchestrator
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.store.open import open_store
from serverlessllm.store.settings import StoreSettings

TOKEN = "token-of-the-test-cluster"  # noqa: S105 - of a cluster that lives for one test
_SHM = Path("/dev/shm")  # noqa: S108 - the DRAM tier is a tmpfs; a fresh directory is made in it


class ClusterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a test may want different."""

    orchestrator: OrchestratorSettings = OrchestratorSettings()
    agent: AgentSettings = AgentSettings(memory_budget_bytes=GIB)
    ingest: IngestSettings = IngestSettings()
    dram_budget_bytes: int = 256 * MIB
    nvme_budget_bytes: int = 256 * MIB


class Cluster:
    """A running cluster; `running` makes one."""

    def __init__(self, directory: Path, dram_dir: Path, settings: ClusterSettings) -> None:
        self.directory = directory
        self.dram_dir = dram_dir
        self.settings = settings
        self.clock = SystemClock()
        self.store = open_store(f"file://{directory}/store", StoreSettings(), self.clock)
        self.agents: dict[str, Agent] = {}
        self.url = ""
        self._metadata: list[SqliteMetadata] = []
        self.registry = self._registry()
        self.ingestion = Ingestion(
            self.registry,
            self.store,
            settings.ingest,
            self.clock,
            work_dir=directory / "ingest",
        )
        self.front = Orchestrator(
            settings.orchestrator,
            registry=self.registry,
            ingestion=self.ingestion,
            store=self.store,
            clock=self.clock,
            token=TOKEN,
            run_dir=directory,
            edge=EdgeSettings(drain_accept_s=0.0),
        )

    async def start(self, agents: int) -> None:
        await self.ingestion.start()
        for number in range(agents):
            await self.add_agent(f"agent-{number}")
        self.url = await self.front.start(Address("http://127.0.0.1:0"))

    async def add_agent(self, name: str) -> Agent:
        """One more node, on the directories of the others."""
        settings = self.settings
        agent = Agent(
            settings.agent,
            agent=AgentId(name),
            registry=self._registry(),
            loader=Loader(
                LoaderSettings(
                    dram_dir=str(self.dram_dir),
                    dram_budget_bytes=settings.dram_budget_bytes,
                    nvme_budget_bytes=settings.nvme_budget_bytes,
                ),
                store=self.store,
                clock=self.clock,
                data_dir=self.directory,
            ),
            backends=Backends(),
            clock=self.clock,
            token=TOKEN,
            run_dir=self.directory,
            log_dir=self.directory / "logs" / name,
        )
        await agent.start()
        self.agents[name] = agent
        return agent

    async def close(self) -> None:
        await self.front.close()
        for agent in self.agents.values():
            await agent.close()
        await self.ingestion.close()
        for metadata in self._metadata:
            await metadata.close()

    def _registry(self) -> Registry:
        """A connection of its own to the shared database."""
        metadata = SqliteMetadata(self.directory / "metadata.db", MetadataSettings(), self.clock)
        self._metadata.append(metadata)
        return Registry(metadata)


@asynccontextmanager
async def running(
    agents: int = 1, settings: ClusterSettings | None = None
) -> AsyncIterator[Cluster]:
    """A cluster on fresh directories (short paths: unix sockets), removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="sllm-"))
    dram_dir = Path(tempfile.mkdtemp(prefix="sllm-test-", dir=_SHM))
    cluster = Cluster(directory, dram_dir, settings or ClusterSettings())
    try:
        await cluster.start(agents)
        yield cluster
    finally:
        await cluster.close()
        shutil.rmtree(dram_dir)
        shutil.rmtree(directory)
