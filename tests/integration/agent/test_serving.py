"""Load, serve, unload, expire: an agent with fake backends, some of it in virtual time."""

from __future__ import annotations

import asyncio
import json

import pytest

from serverlessllm.backends.fake import FakeOptions
from serverlessllm.backends.inside.fake import FakeServer
from serverlessllm.backends.procfs import session_members
from serverlessllm.core.agentapi import KEEP_ALIVE_HEADER, MODEL_HEADER, REFUSED_HEADER, LoadEvent
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.ids import Address, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import ModelSpec
from serverlessllm.edge.server import EdgeServer
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.openai.errors import render_error
from serverlessllm.testing.agents import Machine, chat_body, fake_spec
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.descriptors import open_descriptors
from serverlessllm.testing.waiting import eventually

MODEL = "fake-model"


async def test_load_chat_unload(machine: Machine) -> None:
    events: list[LoadEvent] = []
    async with machine.agent() as agent:
        ready = await agent.load(fake_spec(), on_event=events.append)
        assert ready.state == "ready"
        assert [hop.hop for hop in ready.hops] == ["queue", "start"]
        assert {event.state for event in events} >= {"ready"}
        status, answer, response = await agent.chat(MODEL)
        assert status == 200
        assert answer["choices"][0]["message"]["content"]
        assert response.headers.get("x-request-id")
        row = await agent.model(MODEL)
        assert row is not None
        assert (row.cache_level, row.state) == (CacheLevel.DEVICE, InstanceState.READY)
        assert row.start_s is not None
        assert row.service_s is not None
        assert await agent.unload(MODEL) == 200
        row = await agent.model(MODEL)
        assert row is not None
        assert (row.instances, row.state, row.cache_level) == (0, None, CacheLevel.STORE)
        status, answer, response = await agent.chat(MODEL)
        assert status == 503
        assert answer["error"]["code"] == response.headers.get(REFUSED_HEADER) == "model_not_ready"


async def test_a_load_of_what_is_ready_is_answered_at_once(machine: Machine) -> None:
    async with machine.agent() as agent:
        first = await agent.load(fake_spec())
        again = await agent.load(fake_spec())
        assert (again.state, again.instance, again.hops) == ("ready", first.instance, ())


async def test_a_stream_passes_whole(machine: Machine) -> None:
    async with machine.agent() as agent:
        await agent.load(fake_spec(tokens=5))
        *events, done = await agent.stream(MODEL, stream_options={"include_usage": True})
        assert done == "[DONE]"
        assert json.loads(events[-1])["usage"]["completion_tokens"] == 5


async def test_many_clients_of_a_cold_model_share_one_load(machine: Machine) -> None:
    async with machine.agent() as agent:
        spec = fake_spec(start_s=0.1, slots=4)
        loads = await asyncio.gather(*(agent.load(spec) for _ in range(200)))
        assert {event.state for event in loads} == {"ready"}
        assert len({event.instance for event in loads}) == 1
        answers = await asyncio.gather(*(agent.chat(MODEL) for _ in range(200)))
        by_status = {status: 0 for status, _, _ in answers}
        for status, answer, response in answers:
            by_status[status] += 1
            if status == 429:
                assert answer["error"]["code"] == response.headers.get(REFUSED_HEADER)
                assert int(response.headers.get("retry-after") or 0) >= 1
        assert set(by_status) <= {200, 429}
        assert by_status[200] >= 4 + 32
        assert len(list((machine.root / "logs").glob("*.log"))) == 1


async def test_requests_beyond_the_slots_wait_in_order_and_may_leave(machine: Machine) -> None:
    async with machine.agent() as agent:
        await agent.load(fake_spec(slots=1, tokens=1000, token_s=0.01))
        running = asyncio.ensure_future(agent.stream(MODEL))
        await agent.until(MODEL, lambda row: row.queue_len == 1)
        order: list[int] = []

        async def wait(number: int) -> None:
            await agent.chat(MODEL, max_tokens=1)
            order.append(number)

        waiting = []
        for number in range(3):
            waiting.append(asyncio.ensure_future(wait(number)))
            await agent.until(MODEL, lambda row, n=number: row.queue_len == n + 2)  # type: ignore[misc]  # a default binds the loop's variable
        waiting[1].cancel()
        await agent.until(MODEL, lambda row: row.queue_len == 3)
        running.cancel()
        await asyncio.gather(running, *waiting, return_exceptions=True)
        assert order == [0, 2]
        await agent.until(MODEL, lambda row: row.queue_len == 0)


async def test_a_leaving_client_ends_the_generation(machine: Machine) -> None:
    async with machine.agent() as agent:
        await agent.load(fake_spec(tokens=100_000, token_s=0.001))
        for stream in (True, False):
            asking = asyncio.ensure_future(agent.chat(MODEL, stream=stream))
            await agent.until(MODEL, lambda row: row.queue_len == 1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

            async def ended() -> bool:
                row = await agent.model(MODEL)
                return row is not None and row.queue_len == 0

            await eventually(ended)


async def test_several_instances_when_asked(machine: Machine) -> None:
    async with machine.agent() as agent:
        spec = fake_spec(slots=1, tokens=100_000, token_s=0.001)
        first = await agent.load(spec)
        second = await agent.load(spec, instances=2)
        assert first.instance != second.instance
        asking = [asyncio.ensure_future(agent.chat(MODEL)) for _ in range(2)]
        row = await agent.until(MODEL, lambda row: row.queue_len == 2)
        assert (row.instances, row.slots) == (2, 2)
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


class TestKeepAlive:
    """In virtual time: nothing waits."""

    async def test_the_default_and_what_a_model_says(self, machine: Machine) -> None:
        clock = VirtualClock()
        async with machine.agent(clock=clock, keep_alive_s=100.0) as agent:
            await agent.load(fake_spec())
            await agent.chat(MODEL)
            row = await agent.model(MODEL)
            assert row is not None
            assert row.expires_in_s == pytest.approx(100.0)
            await clock.advance(99.0)
            assert (await agent.chat(MODEL))[0] == 200
            await clock.advance(99.0)
            assert (await agent.model(MODEL)).instances == 1  # type: ignore[union-attr]
            await clock.advance(1.5)
            await agent.until(MODEL, lambda row: row.instances == 0)

    async def test_zero_unloads_with_the_last_request(self, machine: Machine) -> None:
        clock = VirtualClock()
        async with machine.agent(clock=clock) as agent:
            await agent.load(fake_spec(), keep_alive_s=0.0)
            assert (await agent.chat(MODEL))[0] == 200
            await agent.until(MODEL, lambda row: row.instances == 0)

    async def test_a_request_says_otherwise(self, machine: Machine) -> None:
        clock = VirtualClock()
        async with machine.agent(clock=clock) as agent:
            await agent.load(fake_spec(), keep_alive_s=0.0)
            await agent.chat(MODEL, keep_alive_s=-1)
            row = await agent.model(MODEL)
            assert row is not None
            assert row.expires_in_s is None
            await clock.advance(400.0)
            assert (await agent.chat(MODEL))[0] == 200

    async def test_what_nobody_used_goes_after_its_grace(self, machine: Machine) -> None:
        clock = VirtualClock()
        async with machine.agent(clock=clock, first_use_s=10.0) as agent:
            await agent.load(fake_spec(), keep_alive_s=0.0)
            await clock.advance(9.0)
            assert (await agent.model(MODEL)).instances == 1  # type: ignore[union-attr]
            await clock.advance(1.5)
            await agent.until(MODEL, lambda row: row.instances == 0)


async def test_room_is_made_by_the_longest_idle_never_by_who_serves(machine: Machine) -> None:
    mib = 1 << 20
    async with machine.agent(
        memory_budget_bytes=100 * mib, first_use_s=0.0, room_wait_s_max=2.0
    ) as agent:
        for name in ("a", "b"):
            await agent.load(fake_spec(name, memory_bytes=40 * mib, tokens=100_000, token_s=0.001))
            await agent.chat(name, max_tokens=1)
        ready = await agent.load(fake_spec("c", memory_bytes=40 * mib))
        assert ready.state == "ready"
        await agent.until("a", lambda row: row.instances == 0)
        busy = asyncio.ensure_future(agent.chat("b"))
        await agent.until("b", lambda row: row.queue_len == 1)
        await agent.chat("c", max_tokens=1)
        # Both would have to go, and one of them serves.
        failed = await agent.load(fake_spec("d", memory_bytes=80 * mib))
        assert failed.error is not None
        assert failed.error.code == "no_capacity"
        assert (await agent.model("c")).instances == 1  # type: ignore[union-attr]
        never = await agent.load(fake_spec("e", memory_bytes=101 * mib))
        assert never.error is not None
        assert "more than this agent may use" in never.error.message
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)


class TestLoads:
    """Who wants a load, and who must not end it."""

    async def test_who_comes_as_the_last_one_leaves_gets_a_start_of_its_own(
        self, machine: Machine
    ) -> None:
        async with machine.agent() as agent:
            left = asyncio.ensure_future(agent.load(fake_spec(start_s=600)))
            await agent.until(MODEL, lambda row: row.state is InstanceState.STARTING)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
            while any(each.coming for each in agent.agent._instances.all()):
                await asyncio.sleep(0)
            assert (await agent.load(fake_spec())).state == "ready"

    async def test_the_last_to_leave_ends_it(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            loads = [asyncio.ensure_future(agent.load(fake_spec(start_s=600))) for _ in range(2)]
            row = await agent.until(MODEL, lambda row: row.state is InstanceState.STARTING)
            loads[0].cancel()
            await asyncio.gather(loads[0], return_exceptions=True)
            row = await agent.until(MODEL, lambda _: True)
            assert row.state is InstanceState.STARTING
            loads[1].cancel()
            await asyncio.gather(loads[1], return_exceptions=True)

            async def ended() -> bool:
                return await agent.model(MODEL) is None

            await eventually(ended)

    async def test_failing_is_told_to_each_once_and_remembered(self, machine: Machine) -> None:
        clock = VirtualClock()
        async with machine.agent(clock=clock) as agent:
            spec = fake_spec(fail_start=True, start_s=0.1)
            failed = await asyncio.gather(*(agent.load(spec) for _ in range(5)))
            assert {event.error.code for event in failed if event.error} == {"load_failed"}
            assert len(list((machine.root / "logs").glob("*.log"))) == 1
            again = await agent.load(spec)
            assert again.error is not None
            assert again.error.status == 503
            assert len(list((machine.root / "logs").glob("*.log"))) == 1
            await clock.advance(5.0)
            await agent.load(spec)
            assert len(list((machine.root / "logs").glob("*.log"))) == 2

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            (ModelSpec(model=ModelId("m"), backend="nowhere"), "no such backend"),
            (ModelSpec(model=ModelId("m")), "needs a checkpoint"),
            (fake_spec("m", slots="no"), "slots"),
            (ModelSpec(model=ModelId("m"), command=("x", "${y}")), "unknown ${y}"),
        ],
    )
    async def test_no_backend_can_serve_it(
        self, machine: Machine, spec: ModelSpec, reason: str
    ) -> None:
        async with machine.agent() as agent:
            failed = await agent.load(spec)
            assert failed.error is not None
            assert (failed.error.code, failed.error.status) == ("load_failed", 503)
            assert reason in failed.error.message


async def test_somebody_elses_server_is_an_instance_by_its_url(machine: Machine) -> None:
    fake = FakeServer("foreign", FakeOptions())
    server = EdgeServer(fake.handle, EdgeSettings(), render_error, SystemClock())
    url = await server.start(Address("http://127.0.0.1:0"))
    spec = ModelSpec(model=ModelId("m"), url=f"{url}/v1")
    try:
        async with machine.agent() as agent:
            ready = await agent.load(spec)
            assert ready.state == "ready"
            assert (await agent.chat("m"))[0] == 200
            await server.close()
            status, answer, response = await agent.chat("m")
            assert (status, answer["error"]["code"]) == (502, "backend_died")
            assert response.headers.get(REFUSED_HEADER) == "backend_died"
            assert await agent.unload("m") == 200
    finally:
        await server.close()


class TestBadInput:
    """Each answer is of the contract, and says whether another agent may be asked."""

    async def test_routes(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            for method, path, status, code in (
                ("GET", "/nowhere", 404, "not_found"),
                ("GET", "/load", 405, "method_not_allowed"),
                ("POST", "/status", 405, "method_not_allowed"),
                ("POST", "/chunks/ab", 405, "method_not_allowed"),
                ("POST", "/readyz", 405, "method_not_allowed"),
                ("GET", f"/chunks/{'0' * 64}", 404, "not_found"),
                ("POST", "/v1/chat/completions", 400, "invalid_request"),
            ):
                got, answer, response = await agent.ask(method, path)
                assert (got, answer["error"]["code"]) == (status, code)
                assert set(answer["error"]) == {"message", "type", "param", "code"}
                assert response.headers.get(REFUSED_HEADER) is None

    @pytest.mark.parametrize("path", ["/load", "/unload", "/prefetch"])
    async def test_orders(self, machine: Machine, path: str) -> None:
        async with machine.agent() as agent:
            for body in (
                b"",
                b"{",
                b"[]",
                b'{"spec": {}}',
                b'{"spec": {"model": "../x"}, "model": "../x"}',
                b"\xff\xfe",
                b"[" * 100_000,
            ):
                status, answer, _ = await agent.ask("POST", path, body)
                assert status == 400
                assert answer["error"]["message"]
            assert (await agent.status()).models == ()

    async def test_a_prefetch_needs_a_checkpoint_and_a_load_an_instance(
        self, machine: Machine
    ) -> None:
        async with machine.agent() as agent:
            failed = await agent.load(fake_spec(), path="/prefetch")
            assert failed.error is not None
            assert failed.error.status == 400
            failed = await agent.load(fake_spec(), instances=0)
            assert failed.error is not None
            assert failed.error.status == 400

    async def test_keep_alive(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            await agent.load(fake_spec())
            for text in ("soon", "-2", "nan", "inf", ""):
                status, answer, _ = await agent.ask(
                    "POST",
                    "/v1/chat/completions",
                    chat_body(MODEL),
                    **{MODEL_HEADER: MODEL, KEEP_ALIVE_HEADER: text},
                )
                assert (status, answer["error"]["code"]) == (400, "invalid_request")

    async def test_what_the_backend_refuses_is_its_own(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            await agent.load(fake_spec())
            for path, body in (
                ("/v1/chat/completions", b"{}"),
                ("/v1/chat/completions", b"not json"),
                ("/v1/nowhere", b"{}"),
            ):
                status, answer, response = await agent.ask(
                    "POST", path, body, **{MODEL_HEADER: MODEL}
                )
                assert 400 <= status < 500
                assert set(answer["error"]) == {"message", "type", "param", "code"}
                assert response.headers.get(REFUSED_HEADER) is None

    async def test_without_the_token_only_the_probes_answer(self, machine: Machine) -> None:
        async with machine.agent() as agent:
            for path in ("/status", "/metrics", "/v1/models", "/chunks/a", "/load", "/else"):
                async with agent.client.send(agent.address, "GET", path) as response:
                    assert response.status == 401
                    await response.read()
            for path in ("/livez", "/readyz"):
                async with agent.client.send(agent.address, "GET", path) as response:
                    assert response.status == 200
                    await response.read()


async def test_metrics_are_told(machine: Machine) -> None:
    async with machine.agent() as agent:
        await agent.load(fake_spec("counted"))
        await agent.status()
        status, text, _ = await agent.ask("GET", "/metrics")
        assert status == 200
        assert b'sllm_instances{model="counted",state="ready"} 1.0' in text


async def test_everything_is_given_back(machine: Machine) -> None:
    descriptors = open_descriptors()
    tasks = asyncio.all_tasks()
    pids: list[int] = []
    async with machine.agent() as agent:
        for name in ("a", "b"):
            await agent.load(fake_spec(name, tokens=100_000, token_s=0.001))
        asking = [asyncio.ensure_future(agent.chat(name)) for name in ("a", "b")]
        await agent.until("b", lambda row: row.queue_len == 1)
        pids = [each.process.pid for each in agent.agent._instances.all() if each.process]
    await asyncio.gather(*asking, return_exceptions=True)
    assert len(pids) == 2
    assert not any(list(session_members(pid)) for pid in pids)
    assert asyncio.all_tasks() <= tasks
    assert open_descriptors() <= descriptors
    left = {path.name for path in machine.run_dir.rglob("*") if path.is_file() or path.is_socket()}
    assert left == {"lock"}
