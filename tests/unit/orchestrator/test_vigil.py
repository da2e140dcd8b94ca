"""When an agent's silence costs it its requests, and when it does not."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import cast

import pytest

from serverlessllm.core.ids import ModelId
from serverlessllm.edge.upstream import Upstreams, UpstreamTimeout
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.vigil import Vigil
from serverlessllm.scheduler.settings import SchedulerSettings


class Probes:
    """Upstreams that answer, or do not, when the test opens the gate."""

    def __init__(self):
        self.asked = []
        self.cut_off = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.dead = True

    @asynccontextmanager
    async def send(self, address, method, path, *, timeout_s):
        self.asked.append((address, path))
        await self.gate.wait()
        if self.dead:
            raise UpstreamTimeout("silent")
        yield None

    def cut(self, address):
        self.cut_off.append(address)


class Watch:
    def __init__(self, make, clock):
        self.clock = clock
        self.view = ClusterView()
        self.router = Router(self.view, SchedulerSettings(), 3.0, clock)
        self.probes = Probes()
        self.vigil = Vigil(
            OrchestratorSettings(agent_probe_after_s=2.0),
            view=self.view,
            router=self.router,
            upstreams=cast(Upstreams, self.probes),
            clock=clock,
        )
        self.make = make
        self.view.put_model(make.model("m"))
        self.beat(1)

    def beat(self, revision):
        record = self.make.agent("a", self.make.on("m"))
        self.view.put_agent(record, revision, self.clock.now_s())


@pytest.fixture
def watch(make, clock):
    made = Watch(make, clock)
    lease = made.router.lease(ModelId("m"))
    assert lease is not None
    with lease:
        yield made


async def test_a_fresh_agent_is_not_asked(watch):
    await watch.vigil.look()
    assert watch.probes.asked == []


async def test_a_silent_agent_that_does_not_answer_loses_its_requests(watch):
    await watch.clock.advance(2.5)
    await watch.vigil.look()
    assert watch.probes.asked == [("unix:/run/a.sock", "/livez")]
    assert watch.probes.cut_off == ["unix:/run/a.sock"]
    assert watch.view.agents["a"].failed


async def test_a_silent_agent_that_answers_keeps_them(watch):
    watch.probes.dead = False
    await watch.clock.advance(2.5)
    await watch.vigil.look()
    assert watch.probes.cut_off == []


async def test_a_heartbeat_during_the_probe_saves_it(watch, settle):
    watch.probes.gate.clear()
    await watch.clock.advance(2.5)
    looking = asyncio.create_task(watch.vigil.look())
    await settle()
    watch.beat(2)
    watch.probes.gate.set()
    await looking
    assert watch.probes.cut_off == []
    assert not watch.view.agents["a"].failed


async def test_an_agent_whose_lease_ran_out_loses_them_if_it_does_not_answer(watch):
    watch.view.drop_agent("a")
    await watch.vigil.look()
    assert watch.probes.asked == [("unix:/run/a.sock", "/livez")]
    assert watch.probes.cut_off == ["unix:/run/a.sock"]


async def test_an_agent_whose_lease_ran_out_keeps_them_while_it_answers(watch):
    watch.probes.dead = False
    watch.view.drop_agent("a")
    await watch.vigil.look()
    assert watch.probes.cut_off == []


async def test_an_agent_that_comes_back_during_the_probe_keeps_them(watch, settle):
    watch.probes.gate.clear()
    watch.view.drop_agent("a")
    looking = asyncio.create_task(watch.vigil.look())
    await settle()
    watch.beat(2)
    watch.probes.gate.set()
    await looking
    assert watch.probes.cut_off == []


async def test_an_idle_agent_is_never_asked(make, clock):
    watch = Watch(make, clock)
    await watch.clock.advance(60.0)
    await watch.vigil.look()
    assert watch.probes.asked == []


async def test_who_overslept_reads_the_heartbeats_first(watch, clock, settle):
    class Stalling:
        """Time passes at once, and far more of it than was asked for."""

        naps = 0

        def now_s(self):
            return clock.now_s() + 100.0 * self.naps

        async def sleep(self, delay_s):
            if self.naps == 2:
                await asyncio.Event().wait()
            self.naps += 1
            await asyncio.sleep(0)

    watch.vigil._clock = Stalling()
    running = asyncio.create_task(watch.vigil.run())
    await settle()
    assert watch.probes.asked == []
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
