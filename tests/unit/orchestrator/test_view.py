"""What the view keeps, forgets and believes."""

from __future__ import annotations

import asyncio

import pytest

from serverlessllm.core.cluster import CacheLevel, JobRecord, JobStage
from serverlessllm.core.ids import Epoch, ModelId
from serverlessllm.orchestrator.replicas import missing_replicas
from serverlessllm.orchestrator.view import ClusterView, names_like, ready_agents

M, N = ModelId("m"), ModelId("n")


@pytest.fixture
def view():
    return ClusterView()


def job(model, stage=JobStage.CONVERTING):
    return JobRecord(model=model, owner="o", epoch=Epoch(1), stage=stage)


def test_models_are_found_by_every_name(view, make):
    view.put_model(make.model("org/m", aliases=("short", "other")))
    assert view.names == {"org/m": "org/m", "short": "org/m", "other": "org/m"}
    view.put_model(make.model("org/m", aliases=("short",)))
    assert set(view.names) == {"org/m", "short"}
    view.drop_model("org/m")
    assert (view.names, view.models) == ({}, {})


def test_a_canonical_name_beats_an_alias_and_gives_it_back(view, make):
    view.put_model(make.model("a", aliases=("b",)))
    view.put_model(make.model("b"))
    assert view.names["b"] == "b"
    view.drop_model("b")
    assert view.names["b"] == "a"


def test_a_heartbeat_of_an_older_registration_is_ignored(view, make):
    view.put_agent(make.agent("a", make.on("m"), epoch=2), 5, 10.0)
    view.put_agent(make.agent("a", epoch=1), 6, 11.0)
    assert view.agents["a"].record.epoch == 2
    view.put_agent(make.agent("a", epoch=3), 7, 12.0)
    assert view.agents["a"].models == {}


def test_a_list_is_no_sign_of_life_unless_it_is_news(view, make):
    view.put_agent(make.agent("a"), 5, 10.0)
    view.list_agent(make.agent("a"), 9, 20.0)
    assert view.agents["a"].seen_s == 10.0
    view.list_agent(make.agent("a", make.on("m")), 9, 20.0)
    assert view.agents["a"].seen_s == 20.0


def test_what_requests_met_holds_until_the_next_heartbeat(view, make):
    view.put_agent(make.agent("a", make.on("m", ready=False)), 1, 0.0)
    view.became_ready("a", "m")
    view.became_ready("a", "n")
    assert ready_agents(view, M) == ready_agents(view, N) == {"a"}
    assert view.agents["a"].record.models[0].cache_level is CacheLevel.DEVICE
    view.lost("a", "m")
    assert ready_agents(view, M) == set()
    view.failed("a")
    assert view.agents["a"].suspect(0.0, 3.0)
    view.put_agent(make.agent("a"), 2, 1.0)
    assert not view.agents["a"].suspect(1.0, 3.0)
    assert ready_agents(view, N) == set()
    view.failed("gone")
    view.became_ready("gone", "m")


def test_only_news_moves_the_version(view, make):
    view.put_model(make.model("m"))
    view.put_agent(make.agent("a"), 1, 0.0)
    view.put_job(job("m"))
    version = view.version
    view.put_model(make.model("m"))
    view.put_job(job("m"))
    view.drop_model("none")
    view.drop_agent("none")
    view.drop_job("none")
    view.became_ready("none", "m")
    assert view.version == version
    view.drop_job("m")
    assert view.version == version + 1


async def test_changes_wake_all_who_wait_and_time_ends_the_wait(view, clock, settle, make):
    waiting = [asyncio.create_task(view.changed(view.version, clock, 60.0)) for _ in range(2)]
    await settle()
    view.put_model(make.model("m"))
    await asyncio.gather(*waiting)
    await view.changed(0, clock, 60.0)  # changed already
    late = asyncio.create_task(view.changed(view.version, clock, 60.0))
    await settle()
    await clock.advance(61.0)
    assert late.done()


def test_keep_only_forgets_the_rest(view, make):
    for name in ("a", "b"):
        view.put_model(make.model(name))
        view.put_agent(make.agent(name), 1, 0.0)
        view.put_job(job(name))
    view.keep_only(models=["a"], agents=["a"], jobs=["a"])
    assert (set(view.models), set(view.agents), set(view.jobs)) == ({"a"}, {"a"}, {"a"})


def test_hints_are_the_nearest_names(view):
    names = dict.fromkeys(["zeta", "org/smollm2", "smollm3", "alpha"], M)
    assert names_like(names, "x/smollm", 2) == ["org/smollm2", "smollm3"]
    assert names_like(names, "nothing", 0) == []


def test_missing_replicas_are_counted_by_ready_agents(view, make):
    view.put_model(make.model("m", min_replicas=2))
    view.put_model(make.model("n"))
    view.put_agent(make.agent("a", make.on("m")), 1, 0.0)
    assert missing_replicas(view) == ["m"]
    view.put_agent(make.agent("b", make.on("m")), 1, 0.0)
    assert missing_replicas(view) == []


def test_an_alias_that_two_models_have_is_the_older_ones_whenever_it_got_it(make):
    view = ClusterView()
    view.put_model(make.model("old"))
    view.put_model(make.model("new", aliases=("x",)))
    assert view.names["x"] == "new"
    view.put_model(make.model("old", aliases=("x",)))
    assert view.names["x"] == "old"
    view.put_model(make.model("old"))
    assert view.names["x"] == "new"
