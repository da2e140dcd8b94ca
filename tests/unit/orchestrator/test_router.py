"""The choice of an agent, and the counts that it rests on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.orchestrator.conftest import Make

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.ids import AgentId, ModelId
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.scheduler.choose import choose
from serverlessllm.scheduler.estimate import candidate, weights
from serverlessllm.scheduler.settings import SchedulerSettings
from serverlessllm.testing.clock import VirtualClock

MODEL = ModelId("m")
SETTINGS = SchedulerSettings()


@pytest.fixture
def view():
    return ClusterView()


@pytest.fixture
def router(view, clock):
    return Router(view, SETTINGS, 3.0, clock)


def put(view, clock, *agents, revision=1):
    for agent in agents:
        view.put_agent(agent, revision, clock.now_s())


def test_nobody_ready_means_no_lease(view, router, clock, make):
    assert router.lease("m") is None
    view.put_model(make.model("m"))
    assert router.lease("m") is None
    put(view, clock, make.agent("a"), make.agent("b", make.on("m", ready=False)))
    assert router.lease("m") is None


async def test_a_lease_counts_while_it_is_held_whatever_ends_it(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m")))
    with router.lease("m") as lease:
        assert (lease.agent, lease.address) == ("a", "unix:/run/a.sock")
        assert router.in_flight == 1
        assert router.agents_held() == {"a": "unix:/run/a.sock"}
    with pytest.raises(KeyError), router.lease("m"):
        raise KeyError
    assert router.in_flight == 0
    assert router.agents_held() == {}


def test_equal_agents_take_turns(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, *(make.agent(name, make.on("m")) for name in "abc"))
    assert {router.lease("m").agent for _ in range(3)} == {"a", "b", "c"}


async def test_own_requests_count_at_once_and_not_twice(view, router, clock, make):
    view.put_model(make.model("m", max_replicas=2))
    put(view, clock, make.agent("a", make.on("m")), make.agent("b", make.on("m")))
    first = router.lease("m").__enter__()
    second = router.lease("m").__enter__()
    assert {first.agent, second.agent} == {"a", "b"}
    # Both heartbeats now count our own request: that is one each, not two.
    put(
        view, clock,
        make.agent("a", make.on("m", queue_len=1)),
        make.agent("b", make.on("m", queue_len=2)),
        revision=2,
    )  # fmt: skip
    assert [router.lease("m").agent for _ in range(4)] == ["a"] * 4
    second.__exit__(None, None, None)
    first.__exit__(None, None, None)
    assert [router.lease("m").agent for _ in range(4)] == ["a"] * 4


def test_a_suspect_is_chosen_only_alone(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m")), make.agent("b", make.on("m")))
    view.failed("a")
    assert {router.lease("m").agent for _ in range(4)} == {"b"}
    view.failed("b")
    assert router.lease("m") is not None
    put(view, clock, make.agent("a", make.on("m")), revision=2)
    assert {router.lease("m").agent for _ in range(4)} == {"a"}


async def test_silence_makes_a_suspect_by_our_own_clock(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m")))
    await clock.advance(2.0)
    put(view, clock, make.agent("b", make.on("m")))
    assert {router.lease("m").agent for _ in range(4)} == {"a", "b"}
    await clock.advance(1.5)
    assert {router.lease("m").agent for _ in range(4)} == {"b"}


def test_avoided_agents_are_not_asked_again(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m")), make.agent("b", make.on("m")))
    assert {router.lease("m", {"a"}).agent for _ in range(4)} == {"b"}
    assert router.lease("m", {"a", "b"}) is None


def test_a_draining_agent_is_not_asked(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m"), accepting=False))
    assert router.lease("m") is None


async def test_a_queue_dearer_than_a_load_scales_out_but_the_request_stays_warm(
    view, router, clock, make
):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m")), make.agent("b", make.on("m", ready=False)))
    leases = [router.lease("m").__enter__() for _ in range(10)]
    assert {lease.agent for lease in leases} == {"a"}
    assert not leases[0].scale_out
    assert leases[-1].scale_out
    assert leases[-1].predicted_s > leases[0].predicted_s
    for lease in leases:
        lease.__exit__(None, None, None)


async def test_max_replicas_bounds_scaling_out(view, router, clock, make):
    view.put_model(make.model("m", max_replicas=1))
    put(view, clock, make.agent("a", make.on("m")), make.agent("b", make.on("m", ready=False)))
    leases = [router.lease("m").__enter__() for _ in range(50)]
    assert not any(lease.scale_out for lease in leases)
    record = view.models["m"]
    assert router.place(record, {"a"}) is None
    for lease in leases:
        lease.__exit__(None, None, None)


def test_a_load_goes_where_the_bytes_are_nearest(view, router, clock, make):
    view.put_model(make.model("m", size_bytes=1 << 30))
    put(
        view, clock,
        make.agent("far"),
        make.agent("nvme", make.on("m", ready=False, level=CacheLevel.NVME)),
        make.agent("dram", make.on("m", ready=False, level=CacheLevel.DRAM)),
    )  # fmt: skip
    record = view.models["m"]
    placed = router.place(record, ())
    assert (placed.agent, placed.cache_level) == ("dram", CacheLevel.DRAM)
    assert router.place(record, {"dram"}).agent == "nvme"
    view.failed("nvme")
    assert router.place(record, {"dram"}).agent == "far"
    view.failed("far")
    assert router.place(record, {"dram"}).agent == "nvme"
    assert router.place(record, {"dram", "nvme", "far"}) is None


def test_explain_is_the_decision_of_now(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m")), make.agent("b"))
    decision = router.explain(view.models["m"])
    assert decision.winner == "a"
    assert [row.agent for row in decision.rows] == ["a", "b"]


def test_what_is_learned_of_the_first_token_is_predicted(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m")))
    assert router.lease("m").predicted_s == 0.0
    router.learn_first_token("m", 0.25)
    lease = router.lease("m")
    assert (lease.idle, lease.predicted_s) == (True, 0.25)


async def test_agents_and_models_that_went_leave_nothing(view, router, clock, make):
    view.put_model(make.model("m"))
    put(view, clock, make.agent("a", make.on("m")))
    with router.lease("m"):
        view.drop_agent("a")
        assert router.lease("m") is None
        assert router.in_flight == 1
    view.put_model(make.model("n"))
    router.lease("n")
    assert router._lanes == {}


agents = st.lists(
    st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 8), st.sampled_from([0.5, 2.0])),
    min_size=1,
    max_size=5,
)


@given(agents)
def test_the_fast_choice_is_the_schedulers(found):
    """The score split in two parts picks whom `choose` picks among the ready."""
    make, clock, view = Make(), VirtualClock(), ClusterView()
    view.put_model(make.model("m"))
    records = [
        make.agent(f"a{i}", make.on("m", ready=ready, queue_len=queue, slots=slots, service_s=s))
        for i, (ready, queue, slots, s) in enumerate(found)
    ]
    put(view, clock, *records)
    lease = Router(view, SETTINGS, 3.0, clock).lease(MODEL)
    candidates = [
        candidate(record, MODEL, size_bytes=100, backend=None, settings=SETTINGS)
        for record in records
    ]
    decision = choose(candidates, weights(SETTINGS, candidates))
    scores = {row.agent: row.score_s for row in decision.rows}
    ready = [AgentId(f"a{i}") for i, (is_ready, *_) in enumerate(found) if is_ready]
    if not ready:
        assert lease is None
        return
    best = min(scores[name] for name in ready)
    assert lease is not None
    assert scores[lease.agent] == pytest.approx(best)
    colder = [scores[AgentId(f"a{i}")] for i, (is_ready, *_) in enumerate(found) if not is_ready]
    if lease.scale_out:
        assert min(colder) < best
