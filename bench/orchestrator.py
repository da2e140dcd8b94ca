"""The real orchestrator before a mock agent, as a target of `bench.edge`.

    python -m bench.orchestrator PORT UPSTREAM_PORT [--key KEY] [--workers N]

Everything of `sllm orchestrator` runs: registry, watch, view, router, edge, metrics. The agent is a
record in the registry, refreshed each second, whose address is the mock's. Each KEY is one of the
registry's, with a model list and with limits a minute that no load here reaches.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile

from serverlessllm.bootstrap import Control, serve_orchestrator
from serverlessllm.cli.signals import run
from serverlessllm.config.load import Loaded, load
from serverlessllm.core.apikeys import LIMIT_MAX, ApiKey, digest_of
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import AgentRecord, CacheLevel, ModelOnAgent, TierUsage
from serverlessllm.core.ids import Address, AgentId, KeyId, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.metadata.open import open_metadata
from serverlessllm.metadata.registry import Registry
from serverlessllm.metadata.registry.keys import api_key_key
from serverlessllm.metadata.registry.records import encode

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
    with tempfile.TemporaryDirectory(prefix="sllm-bench-") as folder:
        loaded = load(
            overrides={
                "data_dir": f"{folder}/data",
                "runtime_dir": f"{folder}/run",
                "metadata_url": f"sqlite:///{folder}/metadata.db",
                "orchestrator.listen": f"127.0.0.1:{given.port}",
                "orchestrator.workers": given.workers,
                "edge.drain_accept_s": 0,
            }
        )
        run(lambda control: serve(loaded, given.upstream, given.key, control))


async def serve(loaded: Loaded, upstream_port: int, keys: list[str], control: Control) -> None:
    """The orchestrator, and the heart of its agent."""
    assert loaded.settings.metadata_url is not None
    metadata = open_metadata(loaded.settings.metadata_url, loaded.settings.metadata, SystemClock())
    for number, key in enumerate(keys):
        await metadata.put(*api_key(number, key))
    registry = Registry(metadata)
    await registry.put_model(ModelRecord(spec=ModelSpec(model=MODEL, backend="fake")))
    heart = asyncio.get_running_loop().create_task(beat(registry, upstream_port))
    try:
        await serve_orchestrator(loaded, control, print)
    finally:
        heart.cancel()
        await asyncio.gather(heart, return_exceptions=True)
        await metadata.close()


def api_key(number: int, text: str) -> tuple[str, bytes]:
    """Key and record in the metadata store of an API key whose text is known."""
    record = ApiKey(
        id=KeyId(f"key_{number}"),
        name=f"bench {number}",
        sha256=digest_of(text.encode()),
        models=(MODEL,),
        requests_per_minute=LIMIT_MAX,
        tokens_per_minute=LIMIT_MAX,
    )
    return api_key_key(record.id), encode(record)


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
