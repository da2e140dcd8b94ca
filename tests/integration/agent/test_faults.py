"""Backends that die, hang, crash again and again; a metadata store that goes; fencing; draining."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import traceback
from typing import Any, ClassVar

import msgspec
import pytest

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.owner import Owner
from serverlessllm.backends.procfs import session_members
from serverlessllm.core.agentapi import MODEL_HEADER, REFUSED_HEADER, LoadEvent
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import Conflict
from serverlessllm.core.ids import AgentId, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import ModelRecord
from serverlessllm.metadata.registry import Registry
from serverlessllm.testing.agents import AgentClient, Machine, chat_body, fake_spec
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.metadata import FakeMetadata
from serverlessllm.testing.waiting import eventually

MODEL = "fake-model"


def instance(agent: AgentClient) -> Instance:
    (only,) = agent.agent._instances.all()
    return only


def kill(agent: AgentClient, number: signal.Signals = signal.SIGKILL) -> int:
    process = instance(agent).process
    assert process is not None
    os.kill(process.pid, number)
    return process.pid


class TestDeath:
    """`kill -9` of the backend."""

    async def test_while_idle_it_is_noticed_and_comes_back_when_asked(
        self, machine: Machine
    ) -> None:
        async with machine.agent(restart_s_min=0.05) as agent:
            first = await agent.load(fake_spec())
            kill(agent)
            await eventually(lambda: not agent.agent._instances.all())
            status, _, response = await agent.chat(MODEL)
            assert status == 503
            assert response.headers.get(REFUSED_HEADER) == "model_not_ready"
            second = await agent.load(fake_spec())
            assert second.instance != first.instance
            assert (await agent.chat(MODEL))[0] == 200

    async def test_before_the_first_byte_the_request_may_go_elsewhere(
        self, machine: Machine
    ) -> None:
        async with machine.agent(restart_s_min=0.0) as agent:
            await agent.load(fake_spec(crash_at_token=0))
            for _ in range(2):
                status, answer, response = await agent.chat(MODEL)
                assert (status, answer["error"]["code"]) == (503, "model_not_ready")
                assert response.headers.get(REFUSED_HEADER) == "model_not_ready"
                assert (await agent.load(fake_spec(crash_at_token=0))).state == "ready"

    async def test_mid_stream_an_error_event_and_no_done(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            await agent.load(fake_spec(tokens=9, token_s=0.01, crash_at_token=3))
            *events, last = await agent.stream(MODEL)
            error = json.loads(last)["error"]
            assert error["code"] == "backend_died"
            assert set(error) == {"message", "type", "param", "code"}
            assert all(
                choice["finish_reason"] is None
                for event in events
                for choice in json.loads(event)["choices"]
            )

    async def test_half_an_event_is_never_passed_on(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            await agent.load(fake_spec(tokens=9, token_s=0.01, nonsense_at_token=3))
            *events, last = await agent.stream(MODEL)
            assert json.loads(last)["error"]["code"] == "backend_died"
            assert all(json.loads(event)["choices"] for event in events)
            assert instance(agent).usable

    async def test_who_waits_for_a_slot_is_sent_elsewhere(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            await agent.load(fake_spec(slots=1, tokens=100_000, token_s=0.001))
            asking = [asyncio.ensure_future(agent.chat(MODEL)) for _ in range(3)]
            await agent.until(MODEL, lambda row: row.queue_len == 3)
            kill(agent)
            for status, answer, _ in await asyncio.gather(*asking):
                assert (status, answer["error"]["code"]) == (503, "model_not_ready")

    async def test_a_remembered_failure_keeps_nothing_of_who_is_told(
        self, machine: Machine
    ) -> None:
        async with machine.agent(failure_cache_s=60.0, restart_s_min=0.0) as agent:
            for _ in range(10):
                failed = await agent.load(fake_spec(fail_start=True))
                assert failed.error is not None
            failure = agent.agent._instances._models[ModelId(MODEL)].failure
            assert failure is not None
            assert len(traceback.extract_tb(failure.__traceback__)) < 10

    async def test_of_a_deleted_model_only_what_still_counts_is_remembered(
        self, machine: Machine
    ) -> None:
        registry = Registry(machine.metadata)
        await registry.put_model(ModelRecord(spec=fake_spec()))
        clock = VirtualClock()
        async with machine.agent(
            clock=clock, failure_cache_s=0.0, crash_window_s=60.0, catalog_interval_s=10.0
        ) as agent:
            await agent.load(fake_spec())
            await agent.unload(MODEL, CacheLevel.STORE)
            assert (await agent.status()).models[0].start_s is not None
            assert (await agent.load(fake_spec(fail_start=True))).error is not None
            await registry.delete_model(ModelId(MODEL))

            async def forgotten() -> bool:
                return not (await agent.status()).models

            await clock.advance(59)
            assert not await forgotten()
            await clock.advance(11)
            await eventually(forgotten)

    async def test_five_in_a_minute_are_a_crash_loop(self, machine: Machine) -> None:
        clock = VirtualClock()
        async with machine.agent(clock=clock, failure_cache_s=0.0) as agent:
            for _ in range(5):
                failed = await self.load_past_its_pause(agent, clock)
                assert failed.error is not None
                assert failed.error.code == "load_failed"
            looped = await agent.load(fake_spec(fail_start=True))
            assert looped.error is not None
            assert (looped.error.code, looped.error.status) == ("backend_crash_loop", 503)
            logs = (machine.root / "logs").glob("*.log")
            assert all("asked to fail" in path.read_text() for path in logs)
            await clock.advance(60.0)
            assert (await agent.load(fake_spec())).state == "ready"

    async def load_past_its_pause(self, agent: AgentClient, clock: VirtualClock) -> LoadEvent:
        loading = asyncio.ensure_future(agent.load(fake_spec(fail_start=True)))

        async def over() -> bool:
            if any(i.state is InstanceState.QUEUED for i in agent.agent._instances.all()):
                await clock.advance(0.25)  # the pause before the next start
            return loading.done()

        await eventually(over)
        return loading.result()


class TestHang:
    """SIGSTOP, or an engine that goes quiet."""

    SMALL: ClassVar[dict[str, Any]] = {
        "hang_s_min": 0.2,
        "watch_interval_s": 0.1,
        "stats_interval_s": 0.1,
        "stats_timeout_s": 0.05,
    }

    async def test_a_stopped_backend_is_killed(self, machine: Machine) -> None:
        async with machine.agent(**self.SMALL) as agent:
            await agent.load(fake_spec(tokens=9, token_s=0.01, hang_at_token=3))
            pid = instance(agent).process.pid  # type: ignore[union-attr]
            async with asyncio.timeout(60):
                *_, last = await agent.stream(MODEL)
            assert json.loads(last)["error"]["code"] == "backend_died"
            await eventually(lambda: not list(session_members(pid)))

    async def test_a_slow_but_working_one_is_not(self, machine: Machine) -> None:
        async with machine.agent(**self.SMALL, hang_cpu_share=0.0) as agent:
            await agent.load(fake_spec(tokens=2, first_token_s=1.0))
            assert (await agent.chat(MODEL))[0] == 200

    async def test_silence_has_an_end_whatever_it_computes(self, machine: Machine) -> None:
        async with machine.agent(**self.SMALL, hang_cpu_share=0.0, hang_s_max=0.5) as agent:
            await agent.load(fake_spec(tokens=2, first_token_s=3600.0))
            async with asyncio.timeout(60):
                status, answer, _ = await agent.chat(MODEL)
            assert (status, answer["error"]["code"]) == (503, "model_not_ready")

    async def test_an_idle_one_is_left_in_peace(self, machine: Machine) -> None:
        clock = VirtualClock()
        async with machine.agent(clock=clock) as agent:
            await agent.load(fake_spec())
            await clock.advance(60.0)
            assert (await agent.chat(MODEL))[0] == 200


async def test_a_bug_of_the_one_who_decides_is_outlived(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = Owner._decide
    bugs = [OSError("the tier's directory cannot be read")]

    def once_wrong(owner: Owner) -> float | None:
        if bugs:
            raise bugs.pop()
        return decide(owner)

    monkeypatch.setattr(Owner, "_decide", once_wrong)
    async with machine.agent(task_restart_s=0.05) as agent, asyncio.timeout(60):
        assert (await agent.load(fake_spec())).state == "ready"
    assert not bugs


class TestCluster:
    """The metadata store, and another agent of the same name."""

    async def test_it_registers_beats_and_leaves(self, machine: Machine) -> None:
        registry = Registry(machine.metadata)
        async with machine.agent(heartbeat_s=600.0, lease_ttl_s=600.0) as agent:
            (record,) = await registry.list_agents()
            assert record == msgspec.structs.replace(
                await agent.status(), bandwidth=record.bandwidth
            )
            assert {"fake", "llamacpp", "openai"} <= set(record.backends)
            await agent.load(fake_spec())

            async def told() -> bool:
                return bool((await registry.list_agents())[0].models)

            await eventually(told)  # a change of state is told at once
        assert await registry.list_agents() == ()

    async def test_a_store_that_is_away_at_the_start_or_later_stops_nobody(
        self, machine: Machine
    ) -> None:
        metadata = machine.metadata
        assert isinstance(metadata, FakeMetadata)
        registry = Registry(metadata.another())
        metadata.failing = True
        async with machine.agent(reconnect_s_max=0.1, heartbeat_s=0.02) as agent:
            assert (await agent.load(fake_spec())).state == "ready"
            metadata.failing = False
            await eventually(registry.list_agents)
            metadata.failing = True
            calls = metadata.calls
            await eventually(lambda: metadata.calls > calls)
            assert (await agent.chat(MODEL))[0] == 200
            metadata.failing = False

    async def test_a_lost_lease_is_taken_again_with_a_higher_epoch(self, machine: Machine) -> None:
        metadata = machine.metadata
        assert isinstance(metadata, FakeMetadata)
        async with machine.agent(heartbeat_s=0.02) as agent:
            epoch = (await agent.status()).epoch
            registration = agent.agent._heartbeat._registration
            assert registration is not None
            await metadata.revoke(registration.lease)

            async def taken_again() -> bool:
                return (await agent.status()).epoch > epoch

            await eventually(taken_again)

    async def test_a_fenced_agent_serves_nobody_until_the_other_has_gone(
        self, machine: Machine
    ) -> None:
        other = Registry(machine.metadata)
        async with machine.agent(heartbeat_s=0.02, lease_ttl_s=0.2) as agent:
            await agent.load(fake_spec())
            record = await agent.status()
            newer = await other.register_agent(AgentId("one"), 60.0)
            await other.write_agent(newer, record)

            async def fenced() -> bool:
                return not (await agent.status()).accepting

            async def serves_again() -> bool:
                record = await agent.status()
                return record.accepting and record.epoch > newer.epoch

            await eventually(fenced)
            status, answer, response = await agent.chat(MODEL)
            assert (status, answer["error"]["code"]) == (503, "fenced")
            assert response.headers.get(REFUSED_HEADER) == "fenced"
            async with agent.client.send(agent.address, "GET", "/readyz") as response:
                assert response.status == 503
                await response.read()
            refused = await agent.load(fake_spec())
            assert refused.error is not None
            assert refused.error.code == "fenced"
            (seen,) = await other.list_agents()
            assert seen.epoch == newer.epoch
            await other.deregister(newer)
            await eventually(serves_again)
            assert (await agent.load(fake_spec())).state == "ready"

    async def test_two_of_one_name_do_not_start_on_one_machine(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            await agent.load(fake_spec())
            with pytest.raises(Conflict, match="runs on this machine already"):
                async with machine.agent():
                    pass
            assert (await agent.chat(MODEL))[0] == 200


class TestDraining:
    """SIGTERM: what runs is finished, nothing new is begun."""

    async def test_a_running_stream_is_finished(self, machine: Machine) -> None:
        registry = Registry(machine.metadata)
        async with machine.agent() as agent:
            await agent.load(fake_spec(tokens=50, token_s=0.01))
            streaming = asyncio.ensure_future(agent.stream(MODEL))
            await agent.until(MODEL, lambda row: row.queue_len == 1)
            draining = asyncio.ensure_future(agent.agent.drain())

            async def told() -> bool:
                return not (await registry.list_agents())[0].accepting

            await eventually(told)
            assert (await streaming)[-1] == "[DONE]"
            await draining

    async def test_what_takes_too_long_ends_with_an_error_event(self, machine: Machine) -> None:
        async with machine.agent(drain_finish_s=0.2) as agent:
            await agent.load(fake_spec(tokens=100_000, token_s=0.01))
            asked = agent.send(
                "POST",
                "/v1/chat/completions",
                chat_body(MODEL, stream=True),
                **{MODEL_HEADER: MODEL},
            )
            async with asked as response:
                lines = response.lines()
                await anext(lines)  # past the first token: an error before it is a status
                draining = asyncio.ensure_future(agent.agent.drain())
                *_, last = [line async for line in lines if line.startswith(b"data: ")]
            await draining
            assert "error" in json.loads(last.removeprefix(b"data: "))

    async def test_a_load_under_way_is_refused(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            loading = asyncio.ensure_future(agent.load(fake_spec(start_s=60)))
            await agent.until(MODEL, lambda row: row.state is InstanceState.STARTING)
            await agent.agent.drain()
            failed = await loading
            assert failed.error is not None
            assert failed.error.code == "draining"
