"""Real checkpoints on llama.cpp: shared memory, restarts, killed agents, full tiers, peers."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from serverlessllm.backends.procfs import read_stat, session_members
from serverlessllm.checkpoint.index import decode_index
from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.core.models import CheckpointRef, ModelRecord, ModelSpec
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.metadata.registry import Registry
from serverlessllm.testing.agents import AgentClient, Machine
from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.waiting import eventually

SPEC = ModelSpec(model=ModelId("tiny"), source="file:tiny.gguf", options={"context": "512"})
MIB = 1 << 20


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 5 MiB."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_random_gguf(path, layers=8, width=160)


@pytest.fixture
async def tiny(machine: Machine, gguf: Path) -> CheckpointRef:
    return await machine.publish(gguf, "tiny")


def moved(event: LoadEvent) -> dict[str, int]:
    return {hop.hop: hop.bytes_moved for hop in event.hops if hop.bytes_moved}


def pids(agent: AgentClient) -> list[int]:
    return [each.process.pid for each in agent.agent._instances.all() if each.process]


def mapped(pid: int, path: Path) -> dict[str, int]:
    """Bytes by kind of the process's mapping of a file."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.endswith(" kB"):
            kind, _, amount = line.partition(":")
            found[kind] = found.get(kind, 0) + int(amount.split()[0]) * 1024
    return found


async def test_a_cold_load_from_the_store_explains_itself(
    machine: Machine, tiny: CheckpointRef
) -> None:
    events: list[LoadEvent] = []
    async with machine.agent() as agent:
        ready = await agent.load(SPEC, tiny, events.append)
        hops = [hop.hop for hop in ready.hops]
        assert hops[0] == "queue"
        assert hops[-1] == "start"
        assert moved(ready)["store→dram"] == tiny.size_bytes
        assert {event.state for event in events} <= {"queued", "loading", "starting", "ready"}
        status, answer, _ = await agent.chat("tiny", max_tokens=4)
        assert status == 200
        assert answer["model"] == "tiny"
        assert answer["usage"]["completion_tokens"] == 4
        status, answer, _ = await agent.ask(
            "POST",
            "/v1/embeddings",
            msgspec.json.encode({"model": "tiny", "input": "one two"}),
            **{"x-sllm-model": "tiny"},
        )
        assert status == 200
        assert len(answer["data"][0]["embedding"]) == 160


async def test_two_instances_share_the_weights(machine: Machine, tiny: CheckpointRef) -> None:
    async with machine.agent() as agent:
        await agent.load(SPEC, tiny)
        await agent.load(SPEC, tiny, instances=2)
        both = pids(agent)
        assert len(both) == 2
        (bin_path,) = machine.dram_dir.glob("*.bin")
        for pid in both:
            kinds = mapped(pid, bin_path)
            assert kinds["Rss"] > 0.9 * tiny.size_bytes
            assert kinds["Private_Dirty"] + kinds["Private_Clean"] < 0.05 * tiny.size_bytes
            assert kinds["Pss"] < 0.6 * kinds["Rss"]
            assert kinds["Anonymous"] == 0
        dram = (await agent.status()).dram
        assert dram.used_bytes < 1.1 * tiny.size_bytes + 64 * 1024


async def test_a_stopped_model_starts_again_without_reading_a_byte(
    machine: Machine, tiny: CheckpointRef
) -> None:
    async with machine.agent() as agent:
        await agent.load(SPEC, tiny)
        await agent.unload("tiny")
        row = await agent.model("tiny")
        assert row is not None
        assert (row.cache_level, row.instances) == (CacheLevel.DRAM, 0)
        again = await agent.load(SPEC, tiny)
        assert moved(again) == {}
        assert (await agent.chat("tiny", max_tokens=1))[0] == 200
        assert await agent.unload("tiny", CacheLevel.STORE) == 200
        assert (await agent.status()).dram.used_bytes == 0
        assert list(machine.dram_dir.glob("*.bin")) == []


async def test_prefetch_brings_bytes_and_starts_nothing(
    machine: Machine, tiny: CheckpointRef
) -> None:
    async with machine.agent() as agent:
        done = await agent.load(SPEC, tiny, path="/prefetch")
        assert done.state == "ready"
        assert moved(done)["store→dram"] == tiny.size_bytes
        row = await agent.model("tiny")
        assert row is not None
        assert (row.cache_level, row.instances) == (CacheLevel.DRAM, 0)
        assert moved(await agent.load(SPEC, tiny)) == {}


async def test_another_checkpoint_of_the_model_replaces_the_instance(
    machine: Machine, tiny: CheckpointRef, gguf: Path, tmp_path: Path
) -> None:
    newer = await machine.publish(write_random_gguf(tmp_path / "n.gguf", seed=1), "newer")
    async with machine.agent() as agent:
        first = await agent.load(SPEC, tiny)
        second = await agent.load(SPEC, newer)
        assert first.instance != second.instance
        row = await agent.until("tiny", lambda row: row.instances == 1)
        assert row.checkpoint == newer.id


class TestKilled:
    """`kill -9` of the agent, and what the next one finds."""

    @asynccontextmanager
    async def child(self, machine: Machine) -> AsyncIterator[tuple[Process, AgentClient]]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("child.py")),
            *(str(p) for p in (machine.root, machine.run_dir, machine.dram_dir)),
            stdout=PIPE,
        )
        client = Upstreams(UpstreamSettings(), SystemClock())
        assert process.stdout is not None
        try:
            address = (await process.stdout.readline()).decode().strip()
            yield process, AgentClient(Address(address), client, None)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await client.close()

    async def test_no_backend_outlives_it_and_the_next_is_warm(
        self, machine: Machine, tiny: CheckpointRef
    ) -> None:
        async with self.child(machine) as (process, agent):
            await agent.load(SPEC, tiny)
            await agent.load(ModelSpec(model=ModelId("f"), backend="fake"))
            records = list(machine.run_dir.rglob("process.json"))
            backends = [msgspec.json.decode(path.read_bytes())["pid"] for path in records]
            assert len(backends) == 2
            streaming = asyncio.ensure_future(agent.stream("tiny", max_tokens=400))
            await agent.until("tiny", lambda row: row.queue_len == 1)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await asyncio.gather(streaming, return_exceptions=True)
        await eventually(lambda: not any(alive(pid) for pid in backends))
        async with machine.agent() as agent:
            assert list(machine.run_dir.rglob("process.json")) == []
            await agent.agent._loader.settled()
            again = await agent.load(SPEC, tiny)
            assert moved(again) == {}
            assert (await agent.chat("tiny", max_tokens=1))[0] == 200

    async def test_what_pdeathsig_does_not_reach_the_next_agent_kills(
        self, machine: Machine
    ) -> None:
        # A command whose child does the work: the signal is for the command alone.
        command = (
            "sh",
            "-c",
            f"{sys.executable} -m serverlessllm.backends.inside.fake unix:$1 m '{{}}' & wait",
            "sh",
            "${socket}",
        )
        spec = ModelSpec(model=ModelId("m"), command=tuple(c.replace("$1", "$$1") for c in command))
        async with self.child(machine) as (process, agent):
            ready = await agent.load(spec)
            assert ready.state == "ready", ready.error
            (record,) = machine.run_dir.rglob("process.json")
            session = msgspec.json.decode(record.read_bytes())["pid"]
            process.send_signal(signal.SIGKILL)
            await process.wait()
        assert list(session_members(session))
        async with machine.agent():
            await eventually(lambda: not list(session_members(session)))

    async def test_adopted_copies_get_their_names_from_the_registry(
        self, machine: Machine, tiny: CheckpointRef
    ) -> None:
        async with machine.agent() as agent:
            await agent.load(SPEC, tiny, path="/prefetch")
        registry = Registry(machine.metadata)
        await registry.put_model(ModelRecord(spec=SPEC, checkpoint=tiny))
        async with machine.agent() as agent:
            row = await agent.until("tiny", lambda row: row.cache_level is CacheLevel.DRAM)
            assert row.checkpoint == tiny.id


def alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.state != "Z"


async def test_a_full_dram_tier_is_made_room_in_or_says_so(
    machine: Machine, tiny: CheckpointRef, tmp_path: Path
) -> None:
    other = await machine.publish(
        write_random_gguf(tmp_path / "o.gguf", seed=2, layers=8, width=160), "other"
    )
    big = await machine.publish(
        write_random_gguf(tmp_path / "b.gguf", seed=3, layers=16, width=320), "big"
    )
    room = msgspec.structs.replace(machine.loader, dram_budget_bytes=int(1.5 * tiny.size_bytes))
    other_spec = msgspec.structs.replace(SPEC, model=ModelId("other"))
    async with machine.agent(loader=room, first_use_s=0.0, room_wait_s_max=0.3) as agent:
        await agent.load(SPEC, tiny)
        await agent.chat("tiny", max_tokens=1)
        assert (await agent.load(other_spec, other)).state == "ready"
        assert (await agent.until("tiny", lambda row: row.instances == 0)).instances == 0
        failed = await agent.load(msgspec.structs.replace(SPEC, model=ModelId("big")), big)
        assert failed.error is not None
        assert (failed.error.code, failed.error.status) == ("out_of_space", 507)
        busy = asyncio.ensure_future(agent.stream("other", max_tokens=450))
        await agent.until("other", lambda row: row.queue_len == 1)
        refused = await agent.load(SPEC, tiny)
        assert refused.error is not None
        assert refused.error.status == 503
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)
    assert list(machine.dram_dir.glob("*.partial")) == []


async def test_a_corrupt_store_is_a_clear_error_and_leaves_nothing(
    machine: Machine, tiny: CheckpointRef
) -> None:
    bin_path = machine.root / "store" / tiny.prefix / "model.bin"
    data = bytearray(bin_path.read_bytes())
    data[len(data) // 2] ^= 1
    bin_path.write_bytes(data)
    async with machine.agent() as agent:
        failed = await agent.load(SPEC, tiny)
        assert failed.error is not None
        assert failed.error.code == "corrupt_chunk"
        assert (await agent.status()).dram.used_bytes == 0
    shutil.rmtree(machine.root / "store" / tiny.prefix)
    async with machine.agent() as agent:
        failed = await agent.load(SPEC, tiny)
        assert failed.error is not None
        assert failed.error.status in {503, 404}


async def test_peers_get_chunks_by_their_digest(machine: Machine, tiny: CheckpointRef) -> None:
    folder = machine.root / "store" / tiny.prefix
    index = decode_index((folder / "model.idx").read_bytes())
    data = (folder / "model.bin").read_bytes()
    async with machine.agent() as agent:
        path = f"/chunks/{index.chunks[0].blake3}"
        assert (await agent.ask("GET", path))[0] == 404
        await agent.load(SPEC, tiny, path="/prefetch", cache_level=CacheLevel.NVME)
        status, body, _ = await agent.ask("GET", path)
        assert status == 200
        assert body == data[: index.chunk_bytes]
        await agent.unload("tiny", CacheLevel.STORE)
        assert (await agent.ask("GET", path))[0] == 404


async def test_a_pinned_model_stays_in_dram(machine: Machine, tiny: CheckpointRef) -> None:
    async with machine.agent() as agent:
        pinned = msgspec.structs.replace(SPEC, pinned=True)
        await agent.load(pinned, tiny)
        await agent.unload("tiny", CacheLevel.STORE)
        row = await agent.model("tiny")
        assert row is not None
        assert row.cache_level is CacheLevel.DRAM
        assert moved(await agent.load(SPEC, tiny)) == {}


async def test_a_copy_that_cannot_be_pinned_yet_is_pinned_later(
    machine: Machine, tiny: CheckpointRef
) -> None:
    pinned = msgspec.structs.replace(SPEC, pinned=True)
    async with machine.agent() as agent:
        catalog, loader = agent.agent._catalog, agent.agent._loader
        async with await loader.load(tiny, CacheLevel.DRAM) as resident:
            aside = resident.bin_path.rename(machine.dram_dir / "aside")
            resident.bin_path.symlink_to(resident.bin_path)  # whoever opens it is told an error
            await catalog.learn(pinned, tiny)
            aside.replace(resident.bin_path)
            assert not catalog.pinned(tiny.id)
            await catalog.learn(pinned, tiny)
            assert catalog.pinned(tiny.id)


async def test_the_bytes_of_a_pinned_model_are_free_once_it_is_deleted(
    machine: Machine, tiny: CheckpointRef
) -> None:
    registry = Registry(machine.metadata)
    pinned = msgspec.structs.replace(SPEC, pinned=True)
    await registry.put_model(ModelRecord(spec=pinned, checkpoint=tiny))
    async with machine.agent(catalog_interval_s=0.02) as agent:
        await agent.load(pinned, tiny)
        loader = agent.agent._loader
        await agent.unload("tiny", CacheLevel.STORE)
        assert loader.residency() == {tiny.id: CacheLevel.DRAM}
        await registry.delete_model(SPEC.model)

        async def evicted() -> bool:
            await loader.evict(tiny.id, CacheLevel.STORE)
            return not loader.residency()

        await eventually(evicted)


async def test_a_record_takes_one_look_at_the_tiers_however_many_models_there_are(
    machine: Machine, tiny: CheckpointRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(machine.metadata)
    for number in range(20):
        spec = msgspec.structs.replace(SPEC, model=ModelId(f"m{number}"))
        await registry.put_model(ModelRecord(spec=spec, checkpoint=tiny))
    async with machine.agent() as agent:
        await agent.load(SPEC, tiny)
        looks = 0
        residency = agent.agent._loader.residency

        def look() -> object:
            nonlocal looks
            looks += 1
            return residency()

        monkeypatch.setattr(agent.agent._loader, "residency", look)
        assert len(agent.agent.record().models) == 21
        assert looks == 1
