"""`/api/*`: models, loads, pulls, agents, jobs."""

from __future__ import annotations

import msgspec
import pytest

from serverlessllm import __version__
from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.cluster import CacheLevel, JobRecord, JobStage
from serverlessllm.core.errors import LoadFailed, ModelNotFound, NoCapacity, SourceUnavailable
from serverlessllm.core.ids import Address
from serverlessllm.orchestrator.rest import wire


def lines(answer, kind):
    return [msgspec.json.decode(line, type=kind) for line in answer.body.splitlines()]


def read(answer, kind):
    assert answer.status < 300, answer
    return msgspec.json.decode(answer.body, type=kind)


async def test_version(cluster):
    c = await cluster(agents=0)
    assert read(await c.ask("/api/version"), wire.Version).version == __version__


async def test_a_model_is_created_shown_listed_and_served(cluster):
    c = await cluster()
    made = await c.ask("/api/models", {"model": "org/m", "backend": "fake", "aliases": ["short"]})
    assert made.status == 201
    shown = read(await c.ask("/api/models/short"), wire.ModelView)
    assert (shown.model, shown.spec.aliases, shown.checkpoint) == ("org/m", ("short",), None)
    assert [m.model for m in read(await c.ask("/api/models"), wire.ModelList).models] == ["org/m"]
    assert (await c.chat("org/m")).status == 200
    placed = read(await c.ask("/api/models/org/m"), wire.ModelView).placements
    assert [(p.agent, p.on_agent.cache_level) for p in placed] == [("a1", CacheLevel.DEVICE)]


async def test_a_name_is_taken_once(cluster):
    c = await cluster(agents=0)
    await c.ask("/api/models", {"model": "m", "aliases": ["short"]})
    for body in ({"model": "m"}, {"model": "short"}, {"model": "other", "aliases": ["short"]}):
        answer = await c.ask("/api/models", body)
        assert (answer.status, answer.code) == (409, "conflict")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"[]", None),
        (b"[" * 50_000, None),
        ({}, None),
        ({"model": 3}, "model"),
        ({"model": "a b"}, "model"),
        ({"model": "m", "aliases": ["../x"]}, "model"),
        ({"model": "m", "min_replicas": 9}, "min_replicas"),
        ({"model": "m", "max_replicas": 100_000}, "max_replicas"),
        ({"model": "m", "keep_alive_s": -2}, "keep_alive_s"),
        ({"model": "m", "source": "/etc/passwd"}, "source"),
        ({"model": "m", "source": "gopher://x"}, "source"),
        ({"model": "m", "url": "file:///etc"}, "url"),
        ({"model": "m", "options": {"a": "x" * 10_000}}, "options[...]"),
        ({"model": "m", "options": {str(i): "x" for i in range(100)}}, "options"),
    ],
)
async def test_what_may_not_be_registered_is_refused_by_field(cluster, body, param):
    c = await cluster(agents=0)
    answer = await c.ask("/api/models", body)
    assert answer.status == 400
    assert answer.code
    assert answer.json()["error"]["param"] == param
    assert await c.registry.list_models() == ()


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 201),
        ({"accept_commands": False}, 403),
        ({"listen": Address("http://0.0.0.0:8000"), "allow_public_without_key": True}, 403),
        ({"listen": Address("http://0.0.0.0:8000"), "accept_commands": True}, 201),
    ],
)
async def test_a_command_is_taken_from_this_machine_alone(cluster, settings, status):
    c = await cluster(agents=0, **settings)
    answer = await c.ask("/api/models", {"model": "m", "command": ["serve", "${socket}"]})
    assert answer.status == status
    if status == 403:
        assert answer.code == "forbidden"
        assert (await c.ask("/api/models/m")).status == 404


async def test_listings_come_in_pages(cluster):
    c = await cluster(agents=0)
    for name in ("a", "b", "c"):
        await c.ask("/api/models", {"model": name})
    page = read(await c.ask("/api/models?limit=2"), wire.ModelList)
    assert ([m.model for m in page.models], page.next_after) == (["a", "b"], "b")
    page = read(await c.ask("/api/models?limit=2&after=b"), wire.ModelList)
    assert ([m.model for m in page.models], page.next_after) == (["c"], None)
    for limit in ("0", "-1", "x", "100000000000"):
        assert (await c.ask(f"/api/models?limit={limit}")).status == 400


async def test_a_load_streams_its_events_and_sets_keep_alive(cluster):
    c = await cluster()
    await c.register("m")
    events = lines(await c.ask("/api/load", {"model": "m", "keep_alive": "10m"}), LoadEvent)
    assert (events[0].state, events[-1].state) == ("queued", "ready")
    assert [hop.hop for hop in events[-1].hops] == ["nvme→dram", "start"]
    assert [load.keep_alive_s for load in c.agents[0].loads] == [None, 600.0]
    assert (await c.ask("/api/load", {"model": "m", "keep_alive": "never"})).status == 400


async def test_a_load_goes_on_when_the_operator_leaves(cluster):
    c = await cluster()
    await c.register("m")
    c.agents[0].load_gate.clear()
    client = await c.open({"model": "m"}, "/api/load")
    await client.read_until(b"nvme")
    await client.leave()
    later = await c.open({"model": "m"}, "/api/load")
    await later.read_until(b"nvme")  # of the same load
    c.agents[0].load_gate.set()
    await later.read_until(b'"ready"')
    await later.leave()
    assert (len(c.agents[0].loads), c.agents[0].cancelled) == (1, 0)


async def test_a_failed_load_ends_with_its_error(cluster):
    c = await cluster(load_agents_max=1)
    await c.register("m")
    c.agents[0].load_error = LoadFailed("the engine said no")
    events = lines(await c.ask("/api/load", {"model": "m"}), LoadEvent)
    assert (events[-1].state, events[-1].error.code) == ("failed", "load_failed")
    again = await c.ask("/api/load", {"model": "m"})
    assert (again.status, again.code) == (503, "load_failed")
    assert (await c.ask("/api/load", {"model": "nobody"})).status == 404


async def test_unload_reaches_every_agent_that_has_the_model(cluster):
    c = await cluster(agents=3)
    await c.warm("m", c.agents[0], c.agents[1])
    answer = read(await c.ask("/api/unload", {"model": "m", "cache_level": 2}), wire.Unloaded)
    assert sorted(answer.agents) == ["a1", "a2"]
    assert [len(agent.unloads) for agent in c.agents] == [1, 1, 0]
    assert c.agents[0].unloads[0].cache_level is CacheLevel.NVME
    assert (await c.ask("/api/unload", {"model": "nobody"})).status == 404


async def test_delete_unloads_and_frees_and_forgets(cluster):
    c = await cluster()
    await c.register("org/m", source="hf://org/m")
    assert (await c.chat("org/m")).status == 200
    answer = read(await c.ask("/api/models/org/m", method="DELETE"), wire.Deleted)
    assert answer.bytes_freed == 10
    assert c.store.deleted == ["org/m/main"]
    assert c.agents[0].unloads[0].force
    assert await c.registry.get_model("org/m") is None
    assert (await c.ask("/api/models/org/m")).code == "model_not_found"
    assert (await c.ask("/api/models/org/m", method="DELETE")).status == 404


async def test_delete_keeps_a_checkpoint_that_another_model_has(cluster):
    c = await cluster(agents=0)
    await c.register("org/m", source="hf://org/m")
    record = await c.ingestion.ensure("org/m", c.front.view.models["org/m"].spec, lambda _: None)
    spec = msgspec.structs.replace(record.spec, model="org/m@main")
    await c.registry.put_model(msgspec.structs.replace(record, spec=spec))
    await c.until(lambda: "org/m@main" in c.front.view.names)
    answer = read(await c.ask("/api/models/org/m", method="DELETE"), wire.Deleted)
    assert (answer.bytes_freed, c.store.deleted) == (0, [])


async def test_pull_registers_and_ingests_with_progress(cluster):
    c = await cluster(agents=0)
    jobs = lines(await c.ask("/api/pull", {"model": "org/m"}), JobRecord)
    assert [job.stage for job in jobs] == [JobStage.CONVERTING, JobStage.DONE]
    assert jobs[-1].bytes_done == 10
    shown = read(await c.ask("/api/models/org/m"), wire.ModelView)
    assert (shown.spec.source, shown.checkpoint.size_bytes) == ("hf://org/m", 10)
    assert [j.stage for j in lines(await c.ask("/api/pull", {"model": "org/m"}), JobRecord)] == [
        JobStage.DONE
    ]
    other = await c.ask("/api/pull", {"model": "org/m", "source": "hf://else/where"})
    assert other.status == 409


async def test_a_pull_that_fails_says_why_in_its_last_line(cluster):
    c = await cluster(agents=0)
    c.ingestion.error = SourceUnavailable("the hub does not answer")
    answer = await c.ask("/api/pull", {"model": "org/m"})
    last = msgspec.json.decode(answer.body.splitlines()[-1])
    assert last["error"]["code"] == "source_unavailable"


async def test_a_pulled_name_that_has_no_weights_is_forgotten(cluster):
    c = await cluster(agents=0)
    c.ingestion.error = ModelNotFound("the hub has no such model")
    await c.ask("/api/pull", {"model": "org/typo"})
    assert (await c.ask("/api/models/org/typo")).status == 404
    await c.register("org/known", source="hf://org/known")
    await c.ask("/api/pull", {"model": "org/known"})
    assert (await c.ask("/api/models/org/known")).status == 200


async def test_explain_prints_the_terms_of_each_agent(cluster):
    c = await cluster(agents=2)
    await c.warm("m", c.agents[1])
    table = read(await c.ask("/api/explain/m"), wire.Explained)
    assert table.chosen == "a2"
    rows = {row.agent: row for row in table.rows}
    assert rows["a2"].chosen
    assert rows["a1"].score_s > rows["a2"].score_s
    for row in table.rows:
        total = row.cache_term_s + row.kv_term_s + row.queue_term_s + row.move_term_s
        assert row.score_s == pytest.approx(total)


async def test_agents_and_jobs_are_shown(cluster):
    c = await cluster(agents=2)
    agents = read(await c.ask("/api/agents"), wire.AgentList).agents
    assert [a.agent for a in agents] == ["a1", "a2"]
    assert not agents[0].suspect
    assert read(await c.ask("/api/agents/a1"), wire.AgentView).record.backends == ("fake",)
    assert (await c.ask("/api/agents/zz")).status == 404
    assert read(await c.ask("/api/jobs"), wire.JobList).jobs == ()
    claim = await c.registry.claim_job("org/m", "me", 10.0)
    assert not isinstance(claim, JobRecord)
    await c.until(lambda: "org/m" in c.front.view.jobs)
    assert read(await c.ask("/api/jobs/org/m"), JobRecord).owner == "me"
    assert (await c.ask("/api/jobs/org/none")).status == 404


async def test_a_refused_unload_is_told(cluster):
    c = await cluster()
    await c.warm("m")

    async def refuse(request):
        c.agents[0]._refuse(request, NoCapacity("busy"))

    c.agents[0]._server.handler = refuse
    answer = await c.ask("/api/unload", {"model": "m"})
    assert (answer.status, answer.code) == (503, "no_capacity")


async def test_methods_and_routes_of_the_api(cluster):
    c = await cluster(agents=0)
    assert (await c.ask("/api/load")).code == "method_not_allowed"
    assert (await c.ask("/api/nothing")).code == "not_found"
    assert (await c.ask("/api/models", method="PUT", body={})).status == 405
