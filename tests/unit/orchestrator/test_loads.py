"""From nothing to ready: ingest, choice, load, and the next agent."""

from __future__ import annotations

import asyncio

import pytest

from serverlessllm.core.agentapi import HopTiming, LoadEvent
from serverlessllm.core.cluster import JobRecord, JobStage
from serverlessllm.core.errors import (
    LoadFailed,
    ModelNotFound,
    NoCapacity,
    UnsupportedCheckpoint,
)
from serverlessllm.core.ids import Epoch, ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.orchestrator.loads import AgentLost, Loads
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView, ready_agents
from serverlessllm.scheduler.settings import SchedulerSettings

HOPS = (HopTiming(hop="start", seconds=1.0),)


class Agents:
    """What each agent answers, by address; ready by default."""

    def __init__(self):
        self.answers = {}
        self.asked = []
        self.early = []

    async def load(self, address, request, publish):
        self.asked.append(address.removeprefix("unix:/run/").removesuffix(".sock"))
        publish(LoadEvent(state="loading"))
        for event in self.early:
            publish(event)
        answer = self.answers.get(self.asked[-1])
        if answer is not None:
            raise answer
        return LoadEvent(state="ready", hops=HOPS)


class Ingest:
    def __init__(self, make):
        self.make = make
        self.asked = []
        self.error = None

    async def ensure(self, model, spec, on_progress):
        self.asked.append((model, spec.source))
        if self.error is not None:
            raise self.error
        job = JobRecord(
            model=model, owner="o", epoch=Epoch(1), stage=JobStage.CONVERTING, bytes_done=7
        )
        on_progress(job)
        return self.make.model(model, source=spec.source)


class Bench:
    def __init__(self, make, clock, **settings):
        self.view = ClusterView()
        self.agents = Agents()
        self.ingest = Ingest(make)
        self.events = []
        self.ready = []
        self.clock = clock
        self.loads = Loads(
            OrchestratorSettings(agent_wait_s=5.0, **settings),
            view=self.view,
            places=Router(self.view, SchedulerSettings(), 3.0, clock),
            agents=self.agents,
            ingestion=self.ingest,
            clock=clock,
        )

    async def bring_up(self, model="m", *, elsewhere=False):
        return await self.loads.bring_up(model, elsewhere, self.events.append, self.ready.append)

    def put(self, *records):
        for record in records:
            self.view.put_agent(record, 1, self.clock.now_s())


@pytest.fixture
def bench(make, clock):
    made = Bench(make, clock)
    made.view.put_model(make.model("m"))
    return made


async def test_a_model_with_a_checkpoint_goes_straight_to_an_agent(bench, make):
    bench.put(make.agent("a"))
    loaded = await bench.bring_up()
    assert (loaded.agent, loaded.hops) == ("a", HOPS)
    assert bench.ingest.asked == []
    assert ready_agents(bench.view, ModelId("m")) == {"a"}


async def test_a_model_without_one_is_ingested_first(bench, make):
    bench.put(make.agent("a"))
    spec = ModelSpec(model=ModelId("raw"), source="file:///raw")
    bench.view.put_model(ModelRecord(spec=spec))
    await bench.bring_up("raw")
    assert bench.ingest.asked == [("raw", "file:///raw")]
    assert bench.events[0] == LoadEvent(
        state="loading", stage="ingest: converting", bytes_done=7, bytes_total=None
    )


async def test_a_model_that_needs_no_checkpoint_is_never_ingested(bench, make, settle):
    bench.put(make.agent("a"))
    bench.view.put_model(ModelRecord(spec=ModelSpec(model=ModelId("fake"), backend="fake")))
    bench.put(make.agent("a"))
    task = asyncio.create_task(bench.bring_up("fake"))
    await settle()
    await bench.clock.advance(6.0)
    with pytest.raises(NoCapacity):  # the agent has no such backend
        await task
    assert bench.ingest.asked == []


async def test_an_unregistered_hub_name_is_taken_from_the_hub(bench, make):
    bench.put(make.agent("a"))
    await bench.bring_up("org/new@v1")
    assert bench.ingest.asked == [("org/new@v1", "hf://org/new@v1")]
    with pytest.raises(ModelNotFound, match="registered: m"):
        await bench.bring_up("plain")


async def test_the_hub_is_asked_only_when_it_is_allowed(make, clock):
    bench = Bench(make, clock, on_demand_sources=())
    with pytest.raises(ModelNotFound, match="no model is registered"):
        await bench.bring_up("org/new")


async def test_refusals_go_to_the_next_best_three_in_all(bench, make):
    bench.put(*(make.agent(name) for name in "abcd"))
    for name in "abcd":
        bench.agents.answers[name] = NoCapacity(f"{name} is full")
    with pytest.raises(NoCapacity, match="is full"):
        await bench.bring_up()
    assert len(set(bench.agents.asked)) == 3


async def test_an_agent_that_is_gone_is_suspect_and_the_next_is_asked(bench, make):
    bench.put(make.agent("a"), make.agent("b"))
    bench.agents.answers["a"] = AgentLost("gone")
    bench.agents.answers["b"] = None
    loaded = [await bench.bring_up() for _ in range(2)]
    assert {found.agent for found in loaded} == {"b"}
    assert bench.view.agents["a"].failed or "a" not in bench.agents.asked


async def test_a_permanent_failure_ends_it(bench, make):
    bench.put(make.agent("a"), make.agent("b"))
    for name in "ab":
        bench.agents.answers[name] = UnsupportedCheckpoint("no engine reads it")
    with pytest.raises(UnsupportedCheckpoint):
        await bench.bring_up()
    assert len(bench.agents.asked) == 1


async def test_a_restarted_agent_is_a_new_chance(bench, make, clock, settle):
    bench.put(make.agent("a", epoch=1))
    bench.agents.answers["a"] = AgentLost("gone")
    task = asyncio.create_task(bench.bring_up())
    await settle()
    assert not task.done()
    await clock.advance(2.0)
    bench.agents.answers.clear()
    bench.put(make.agent("a", epoch=2))
    assert (await task).agent == "a"


async def test_without_agents_it_waits_a_little_then_says_so(bench, clock, settle):
    task = asyncio.create_task(bench.bring_up())
    await settle()
    await clock.advance(4.9)
    assert not task.done()
    await clock.advance(0.2)
    with pytest.raises(NoCapacity):
        await task


async def test_elsewhere_means_where_it_is_not_ready_yet(bench, make):
    bench.put(make.agent("a", make.on("m")), make.agent("b"))
    assert (await bench.bring_up(elsewhere=True)).agent == "b"
    with pytest.raises(NoCapacity):
        await bench.bring_up(elsewhere=True)


async def test_a_load_that_failed_is_the_error_in_the_end(bench, make):
    bench.put(make.agent("a"))
    bench.agents.answers["a"] = LoadFailed("the engine said no")
    with pytest.raises(LoadFailed):
        await bench.bring_up()


SO_FAR = (HopTiming(hop="start", seconds=0.5),)
EARLY = LoadEvent(state="ready", arriving=True, hops=SO_FAR)


async def test_who_is_ready_before_its_bytes_is_told_of_once_and_completed_later(bench, make):
    bench.put(make.agent("a"))
    bench.agents.early = [EARLY, EARLY]
    loaded = await bench.bring_up()
    (ready,) = bench.ready
    assert (ready.agent, ready.hops) == ("a", SO_FAR)
    assert (loaded.agent, loaded.hops) == ("a", HOPS)
    assert all(event.state != "ready" for event in bench.events)
    assert ready_agents(bench.view, ModelId("m")) == {"a"}


@pytest.mark.parametrize("end", [AgentLost(), LoadFailed("the bytes did not come")])
async def test_what_befalls_it_later_starts_nothing_elsewhere(bench, make, end):
    bench.put(make.agent("a"), make.agent("b"))
    bench.agents.early = [EARLY]
    bench.agents.answers = {"a": end, "b": end}
    loaded = await bench.bring_up()
    assert bench.ready == [loaded]
    assert bench.agents.asked == [loaded.agent]
