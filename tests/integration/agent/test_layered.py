"""Engines that start while their checkpoint moves: what overlaps, and what each end leaves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from crc32c import crc32c

from serverlessllm.agent.instance import Instance
from serverlessllm.backends.inside.fake_layers import Told
from serverlessllm.backends.procfs import session_members
from serverlessllm.core.agentapi import MODEL_HEADER, LoadEvent
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import StoreUnavailable
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import CheckpointRef, ModelSpec
from serverlessllm.loader.tiers.nvme import DirectFile
from serverlessllm.testing.agents import AgentClient, Machine, chat_body, fake_spec
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.descriptors import open_descriptors
from serverlessllm.testing.stores import CHUNK_BYTES, GatedStore, publish_random
from serverlessllm.testing.waiting import eventually

MODEL = "fake-model"
CHUNKS = 6
GONE = StoreUnavailable("the store has gone")


def spec(**options: object) -> ModelSpec:
    asked: dict[str, object] = {"layered": True, "tokens": CHUNKS}
    return fake_spec(MODEL, **(asked | options))


class Bench:
    """A machine whose store gives what it is told to, and a checkpoint in it."""

    def __init__(
        self, machine: Machine, store: GatedStore, ref: CheckpointRef, chunks: list[bytes]
    ) -> None:
        self.machine = machine
        self.store = store
        self.ref = ref
        self.said = [f"{crc32c(chunk):08x}" for chunk in chunks]
        """The token of each layer."""
        self.events: list[LoadEvent] = []

    @asynccontextmanager
    async def agent(self, **settings: object) -> AsyncIterator[AgentClient]:
        """An agent that leaves nothing behind."""
        descriptors = open_descriptors()
        tasks = asyncio.all_tasks()
        async with self.machine.agent(
            **{"failure_cache_s": 0.0, "restart_s_min": 0.0} | settings  # type: ignore[arg-type]
        ) as agent:
            yield agent
        assert list(self.machine.dram_dir.glob("*.partial")) == []
        left = {path.name for path in self.machine.run_dir.rglob("*") if path.is_file()}
        assert left <= {"lock"}
        assert open_descriptors() <= descriptors
        await eventually(lambda: asyncio.all_tasks() <= tasks)
        assert self.store.held == 0

    def load(self, agent: AgentClient, **options: object) -> asyncio.Task[LoadEvent]:
        return asyncio.ensure_future(agent.load(spec(**options), self.ref, self.events.append))

    async def ready(self, agent: AgentClient, **options: object) -> asyncio.Task[LoadEvent]:
        """A load whose engine is ready before its bytes are there."""
        load = self.load(agent, **options)
        await eventually(lambda: [e for e in self.events if e.state == "ready"])
        return load


@pytest.fixture
async def bench(machine: Machine) -> Bench:
    store = GatedStore(machine.root / "store")
    machine.store = store
    machine.loader = msgspec.structs.replace(machine.loader, progress_interval_s=0.0)
    ref, chunks = await publish_random(store, machine.root, "layers", chunks=CHUNKS)
    return Bench(machine, store, ref, chunks)


def instance(agent: AgentClient) -> Instance:
    (only,) = agent.agent._instances.all()
    return only


def pid(agent: AgentClient) -> int:
    process = instance(agent).process
    assert process is not None
    return process.pid


async def told(agent: AgentClient) -> Told:
    async with agent.client.send(instance(agent).address, "GET", "/layers") as response:
        return msgspec.json.decode(await response.read(), type=Told)


class Stream:
    """A chat whose tokens are taken as they come."""

    def __init__(self, agent: AgentClient) -> None:
        self.tokens: list[str] = []
        self.code: str | None = None
        self.done = asyncio.ensure_future(self._run(agent))

    async def _run(self, agent: AgentClient) -> None:
        async with agent.send(
            "POST",
            "/v1/chat/completions",
            chat_body(MODEL, stream=True),
            **{MODEL_HEADER: MODEL},
        ) as response:
            async for line in response.lines():
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))

    def _take(self, event: dict[str, object]) -> None:
        error = event.get("error")
        if isinstance(error, dict):
            self.code = error["code"]
            return
        for choice in event["choices"]:  # type: ignore[attr-defined]
            if choice["delta"].get("content"):
                self.tokens.append(choice["delta"]["content"])


async def test_the_first_layer_answers_before_the_last_arrives(bench: Bench) -> None:
    bench.store.let(2 * CHUNK_BYTES)
    async with bench.agent() as agent:
        load = await bench.ready(agent)
        stream = Stream(agent)
        await eventually(lambda: len(stream.tokens) == 2)
        assert sorted((await told(agent)).arrived) == [0, 1]
        assert instance(agent).state is InstanceState.READY
        bench.store.let()
        await stream.done
        assert stream.tokens == bench.said
        assert (await load).state == "ready"
        await eventually(lambda: not instance(agent).arriving)
        arrived = (await told(agent)).arrived
        assert sorted(arrived) == list(range(CHUNKS))
        assert (await told(agent)).whole


async def test_from_nvme_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    honest = DirectFile.read_into

    def gated(self: DirectFile, view: memoryview, offset: int, size: int) -> None:
        if offset >= 2 * CHUNK_BYTES:
            assert opened.wait(20.0)
        honest(self, view, offset, size)

    async with bench.agent() as agent:
        order = CacheLevel.NVME
        await agent.load(spec(), bench.ref, path="/prefetch", cache_level=order)
        monkeypatch.setattr(DirectFile, "read_into", gated)
        try:
            load = await bench.ready(agent)
            stream = Stream(agent)
            await eventually(lambda: len(stream.tokens) == 2)
            assert not (await told(agent)).whole
        finally:
            opened.set()
        await stream.done
        assert stream.tokens == bench.said
        assert [hop.hop for hop in (await load).hops if hop.bytes_moved] == ["nvme→dram"]


async def test_whole_weights_come_without_arrivals(bench: Bench) -> None:
    async with bench.agent() as agent:
        await agent.load(spec(), bench.ref, path="/prefetch")
        final = await agent.load(spec(), bench.ref, bench.events.append)
        assert (final.state, final.arriving) == ("ready", False)
        assert not any(event.arriving for event in bench.events)
        assert await told(agent) == Told(arrived=(), whole=True)
        _, answer, _ = await agent.chat(MODEL)
        assert answer["choices"][0]["message"]["content"] == "".join(bench.said)


async def test_an_engine_that_is_not_layered_waits_for_all(bench: Bench) -> None:
    bench.store.let(CHUNK_BYTES)
    async with bench.agent() as agent:
        load = bench.load(agent, layered=False)
        await eventually(lambda: [e for e in bench.events if e.bytes_done == CHUNK_BYTES])
        assert instance(agent).state is InstanceState.LOADING
        assert instance(agent).process is None
        bench.store.let()
        assert (await load).state == "ready"
        assert not any(event.arriving for event in bench.events)


async def test_the_breakdown_is_complete_in_the_end(bench: Bench) -> None:
    bench.store.let(2 * CHUNK_BYTES)
    async with bench.agent() as agent:
        load = await bench.ready(agent)
        (early,) = [event for event in bench.events if event.arriving]
        assert [hop.hop for hop in early.hops] == ["queue", "store→dram", "start"]
        assert early.hops[1].bytes_moved <= 2 * CHUNK_BYTES
        bench.store.let()
        final = await load
        assert not final.arriving
        assert [hop.hop for hop in final.hops] == ["queue", "store→dram", "start"]
        _, hop, start = final.hops
        assert hop.bytes_moved == bench.ref.size_bytes
        assert 0 < hop.first_s < hop.seconds
        assert start.seconds < hop.seconds  # it lies within it
        record = await agent.model(MODEL)
        assert record is not None
        assert record.cache_level is CacheLevel.DEVICE


async def test_progress_is_told_while_it_starts(bench: Bench) -> None:
    bench.store.let(CHUNK_BYTES)
    async with bench.agent(event_interval_s=0.0) as agent:
        load = bench.load(agent, start_s=0.5)
        await eventually(lambda: [e for e in bench.events if e.state == "starting"])
        bench.store.let(3 * CHUNK_BYTES)
        await eventually(
            lambda: [
                event
                for event in bench.events
                if event.state == "starting" and event.bytes_done == 3 * CHUNK_BYTES
            ]
        )
        bench.store.let()
        await load
    assert bench.events[-1].state == "ready"


async def test_progress_is_told_after_it_is_ready(bench: Bench) -> None:
    bench.store.let(CHUNK_BYTES)
    async with bench.agent(event_interval_s=0.0) as agent:
        load = await bench.ready(agent)

        def told_of(chunks: int) -> list[LoadEvent]:
            ready = next(at for at, event in enumerate(bench.events) if event.arriving)
            later = bench.events[ready + 1 :]
            return [event for event in later if event.bytes_done == chunks * CHUNK_BYTES]

        await eventually(lambda: told_of(1))
        bench.store.let(3 * CHUNK_BYTES)
        await eventually(lambda: told_of(3))
        event = told_of(3)[0]
        assert (event.state, event.stage) == ("loading", "store→dram")
        assert event.bytes_total == bench.ref.size_bytes
        bench.store.let()
        assert not (await load).arriving


async def test_who_asks_later_hears_of_the_bytes_too(bench: Bench) -> None:
    """Another orchestrator, or the same one after a restart."""
    bench.store.let(CHUNK_BYTES)
    async with bench.agent() as agent:
        await bench.ready(agent)

        async def reported() -> bool:
            record = await agent.model(MODEL)
            return record is not None and record.arriving

        await eventually(reported)
        late: list[LoadEvent] = []
        load = asyncio.ensure_future(agent.load(spec(), bench.ref, late.append))
        await eventually(lambda: [event for event in late if event.bytes_total])
        assert late[0].arriving
        bench.store.let()
        assert not (await load).arriving
        assert len(agent.agent._instances.all()) == 1
        await eventually(lambda: _is_whole(agent))


async def _is_whole(agent: AgentClient) -> bool:
    record = await agent.model(MODEL)
    return record is not None and not record.arriving


async def test_nobody_need_wait_for_its_bytes_to_keep_it(bench: Bench) -> None:
    """A client whose budget is over comes back: its idle time begins when the bytes are there."""
    bench.store.let(CHUNK_BYTES)
    clock = VirtualClock()
    async with bench.agent(clock=clock, first_use_s=10.0) as agent:
        await bench.ready(agent)
        only = instance(agent)
        only.keep_alive_s = 1.0
        await clock.advance(60.0)
        assert only.usable
        bench.store.let()
        await eventually(lambda: not only.arriving)
        await clock.advance(9.0)
        assert only.usable
        await clock.advance(2.0)
        await eventually(lambda: not agent.agent._instances.all())


async def test_a_second_instance_joins_what_arrives(bench: Bench) -> None:
    bench.store.let(3 * CHUNK_BYTES)
    async with bench.agent() as agent:
        load = await bench.ready(agent)
        second: list[LoadEvent] = []
        more = asyncio.ensure_future(agent.load(spec(), bench.ref, second.append, instances=2))
        await eventually(lambda: [event for event in second if event.arriving])
        bench.store.let()
        assert {(await load).state, (await more).state} == {"ready"}
        for each in agent.agent._instances.all():
            async with agent.client.send(each.address, "GET", "/layers") as response:
                layers = msgspec.json.decode(await response.read(), type=Told)
            assert sorted(layers.arrived) == list(range(CHUNKS))


class TestLoadFails:
    """The bytes do not come."""

    async def test_before_ready_who_waits_is_told_why(self, bench: Bench) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            loads = [bench.load(agent, start_s=60) for _ in range(3)]
            await eventually(
                lambda: agent.agent._instances.all() and instance(agent).process is not None
            )
            engine = pid(agent)
            bench.store.fail(GONE)
            for failed in await asyncio.gather(*loads):
                assert failed.error is not None
                assert (failed.state, failed.error.code) == ("failed", "store_unavailable")
            await eventually(lambda: not list(session_members(engine)))
            bench.store.let()
            assert (await agent.load(spec(), bench.ref)).state == "ready"

    async def test_after_ready_streams_break_with_an_error_within_a_second(
        self, bench: Bench
    ) -> None:
        bench.store.let(2 * CHUNK_BYTES)
        async with bench.agent() as agent:
            load = await bench.ready(agent)
            stream = Stream(agent)
            await eventually(lambda: len(stream.tokens) == 2)
            bench.store.fail(GONE)
            await stream.done
            assert (stream.tokens, stream.code) == (bench.said[:2], "backend_died")
            failed = await load
            assert failed.error is not None
            assert (failed.state, failed.error.code) == ("failed", "store_unavailable")
            await eventually(lambda: not agent.agent._instances.all())
            bench.store.let()
            assert (await agent.load(spec(), bench.ref)).state == "ready"
            assert (await agent.chat(MODEL))[0] == 200

    async def test_after_ready_a_request_without_an_answer_may_go_elsewhere(
        self, bench: Bench
    ) -> None:
        bench.store.let(0)
        async with bench.agent() as agent:
            load = await bench.ready(agent)
            asking = asyncio.ensure_future(agent.chat(MODEL))
            await agent.until(MODEL, lambda row: row.queue_len == 1)
            bench.store.fail(GONE)
            status, answer, _ = await asking
            assert (status, answer["error"]["code"]) == (503, "model_not_ready")
            assert (await load).state == "failed"

    async def test_it_is_no_crash_of_the_backend(self, bench: Bench) -> None:
        async with bench.agent(crashes_max=2) as agent:
            for _ in range(3):
                bench.store.let(CHUNK_BYTES)
                bench.events.clear()
                load = await bench.ready(agent)
                bench.store.fail(GONE)
                failed = await load
                assert failed.error is not None
                assert failed.error.code == "store_unavailable"
                await eventually(lambda: not agent.agent._instances.all())


class TestEngineEnds:
    """While its bytes still move."""

    async def test_killed_when_ready_the_load_ends_too(self, bench: Bench) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            load = await bench.ready(agent)
            os.kill(pid(agent), signal.SIGKILL)
            failed = await load
            assert failed.error is not None
            assert failed.error.code == "backend_died"
            await eventually(lambda: bench.store.held == 0)
            assert list(bench.machine.dram_dir.iterdir()) == []

    async def test_that_fails_its_start_ends_the_load_too(self, bench: Bench) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            failed = await bench.load(agent, fail_start=True)
            assert failed.error is not None
            assert failed.error.code == "load_failed"
            await eventually(lambda: bench.store.held == 0)
            assert list(bench.machine.dram_dir.iterdir()) == []

    async def test_a_load_that_others_wait_for_goes_on(self, bench: Bench) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            load = await bench.ready(agent)
            prefetch = asyncio.ensure_future(agent.load(spec(), bench.ref, path="/prefetch"))
            flights = agent.agent._loader._flights
            await eventually(lambda: flights[bench.ref.id]._waiters == 2)
            os.kill(pid(agent), signal.SIGKILL)
            assert (await load).state == "failed"
            bench.store.let()
            assert (await prefetch).state == "ready"
            assert await agent.model(MODEL) is not None


class TestStopped:
    """Whoever ends it, at whatever point: nothing is left (`Bench.agent` looks)."""

    async def test_unloaded_while_the_engine_starts(self, bench: Bench) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            load = bench.load(agent, start_s=60)
            await eventually(
                lambda: agent.agent._instances.all() and instance(agent).process is not None
            )
            engine = pid(agent)
            await agent.unload(MODEL, force=True)
            assert (await load).state == "failed"
            assert not list(session_members(engine))
            assert bench.store.held == 0

    @pytest.mark.parametrize("force", [True, False])
    async def test_unloaded_when_ready(self, bench: Bench, *, force: bool) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            load = await bench.ready(agent)
            engine = pid(agent)
            await agent.unload(MODEL, force=force)
            assert (await load).state == "failed"
            assert not list(session_members(engine))
            assert bench.store.held == 0
            assert list(bench.machine.dram_dir.iterdir()) == []

    async def test_draining_waits_for_the_answers_bytes(self, bench: Bench) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            await bench.ready(agent)
            stream = Stream(agent)
            await eventually(lambda: len(stream.tokens) == 1)
            unload = asyncio.ensure_future(agent.unload(MODEL))
            await eventually(lambda: instance(agent).state is InstanceState.DRAINING)
            bench.store.let()
            await stream.done
            assert stream.tokens == bench.said
            assert await unload == 200

    @pytest.mark.parametrize("start_s", [0, 60])
    async def test_the_agent_ends(self, bench: Bench, start_s: int) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            load = bench.load(agent, start_s=start_s)
            await eventually(
                lambda: (
                    agent.agent._instances.all()
                    and instance(agent).process is not None
                    and (start_s or instance(agent).state is InstanceState.READY)
                )
            )
            engine = pid(agent)
        await asyncio.gather(load, return_exceptions=True)
        assert not list(session_members(engine))

    async def test_the_client_leaves_while_the_engine_starts(self, bench: Bench) -> None:
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            load = bench.load(agent, start_s=60)
            await eventually(
                lambda: agent.agent._instances.all() and instance(agent).process is not None
            )
            engine = pid(agent)
            load.cancel()
            await eventually(lambda: not agent.agent._instances.all() and not bench.store.held)
        assert not list(session_members(engine))

    async def test_the_client_leaves_when_it_is_ready(self, bench: Bench) -> None:
        """It asked for an instance and has it: the load goes on."""
        bench.store.let(CHUNK_BYTES)
        async with bench.agent() as agent:
            load = await bench.ready(agent)
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            bench.store.let()
            await eventually(lambda: not instance(agent).arriving)
            assert (await agent.chat(MODEL))[0] == 200


async def test_who_waits_for_bytes_does_not_hang(bench: Bench) -> None:
    bench.store.let(CHUNK_BYTES)
    hasty = {"hang_s_min": 0.02, "hang_s_max": 0.05, "watch_interval_s": 0.01}
    async with bench.agent(**hasty, hang_cpu_share=0.0) as agent:
        await bench.ready(agent)
        stream = Stream(agent)
        await eventually(lambda: len(stream.tokens) == 1)
        silent_s = instance(agent).activity.looked_s
        await eventually(lambda: instance(agent).activity.looked_s > silent_s + 0.3)
        bench.store.let()
        await stream.done
        assert stream.tokens == bench.said


async def test_bytes_that_never_come_have_an_end(bench: Bench) -> None:
    bench.store.let(CHUNK_BYTES)
    clock = VirtualClock()
    async with bench.agent(clock=clock, load_s_max=100.0) as agent:
        load = await bench.ready(agent)
        await clock.advance(100.0)
        assert (await load).state == "failed"
        assert agent.agent._instances.all() == ()


async def test_the_bytes_stay_in_dram_for_as_long_as_the_instance(bench: Bench) -> None:
    async with bench.agent() as agent:
        await agent.load(spec(), bench.ref)
        loader = agent.agent._loader
        await loader.settled()
        assert await loader.evict(bench.ref.id, CacheLevel.NVME) == 0
        assert [path.name for path in bench.machine.dram_dir.glob("*.bin")] == [
            f"{bench.ref.id}.bin"
        ]
        await agent.unload(MODEL)
        assert await loader.evict(bench.ref.id, CacheLevel.NVME) == bench.ref.size_bytes
