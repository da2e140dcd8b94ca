"""The real orchestrator before a mock agent, as a target of `bench.edge`.

    python -m bench.orchestrator PORT UPSTREAM_PORT [--key KEY] [--workers N]

Everything of `sllm orchestrator` runs: registry, watch, view, router, edge, metrics. The agent is a
record in the registry, refreshed each second, whose address is the mock's.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import tempfile

from serverlessllm.bootstrap import serve_orchestrator
from serverlessllm.cli.signals import run
from serverlessllm.config.load import Loaded, load
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import AgentRecord, CacheLevel, ModelOnAgent, TierUsage
from serverlessllm.core.ids import Address, AgentId, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.metadata.open import open_metadata
from serverlessllm.metadata.registry import Registry

MODEL = ModelId("mock")
SLOTS = 1024
HEARTBEAT_S = 1.0
LEASE_S = 10.0


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("upstream", type=int)
    parser.add_argument("--key", action="append", default=[])
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    keys = [hashlib.sha256(key.encode()).hexdigest() for key in given.key]
    with tempfile.TemporaryDirectory(prefix="sllm-bench-") as folder:
        loaded = load(
            overrides={
                "data_dir": f"{folder}/data",
                "runtime_dir": f"{folder}/run",
                "metadata_url": f"sqlite:///{folder}/metadata.db",
                "orchestrator.listen": f"127.0.0.1:{given.port}",
                "orchestrator.workers": given.workers,
                "orchestrator.api_key_sha256": keys,
                "edge.drain_accept_s": 0,
            }
        )
        run(lambda stop: serve(loaded, given.upstream, f"sqlite:///{folder}/metadata.db", stop))


async def serve(loaded: Loaded, upstream_port: int, metadata_url: str, stop: asyncio.Event) -> None:
    """The orchestrator, and the heart of its agent."""
    metadata = open_metadata(metadata_url, loaded.settings.metadata, SystemClock())
    registry = Registry(metadata)
    await registry.put_model(ModelRecord(spec=ModelSpec(model=MODEL, backend="fake")))
    heart = asyncio.get_running_loop().create_task(beat(registry, upstream_port))
    try:
        await serve_orchestrator(loaded, stop, print)
    finally:
        heart.cancel()
        await asyncio.gather(heart, return_exceptions=True)
        await metadata.close()


async def beat(registry: Registry, upstream_port: int) -> None:
    """Register the mock as an agent on which the model is ready, again and again."""
    agent = AgentId("mock")
    registration = await registry.register_agent(agent, LEASE_S)
    record = AgentRecord(
        agent=agent,
        epoch=registration.epoch,
        address=Address(f"http://127.0.0.1:{upstream_port}"),
        backends=("fake",),
        dram=TierUsage(budget_bytes=0, used_bytes=0),
        nvme=TierUsage(budget_bytes=0, used_bytes=0),
        models=(
            ModelOnAgent(
                model=MODEL,
                cache_level=CacheLevel.DEVICE,
                state=InstanceState.READY,
                slots=SLOTS,
                instances=1,
            ),
        ),
    )
    while True:
        await registry.write_agent(registration, record)
        await asyncio.sleep(HEARTBEAT_S)


if __name__ == "__main__":
    main()
