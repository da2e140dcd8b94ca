"""The choice: deterministic, blind to order, fair between equals, and it says why."""

from __future__ import annotations

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.ids import AgentId
from serverlessllm.scheduler.choose import (
    EXPLAIN_COLUMNS,
    Candidate,
    Exclusion,
    choose,
    explain,
    limit_replicas,
)
from serverlessllm.scheduler.score import Weights

W = Weights(alpha_s=1.0, beta_s=0.5, gamma_s=2.0)


def agent(name: str, level: CacheLevel = CacheLevel.DEVICE, **fields: object) -> Candidate:
    return msgspec.structs.replace(Candidate(agent=AgentId(name), cache_level=level), **fields)


@given(st.integers())
def test_of_equal_scores_the_one_that_evicts_least_is_asked_first(tie) -> None:
    full = agent("full", CacheLevel.STORE, evicted_bytes=1)
    spare = agent("spare", CacheLevel.STORE)
    better = agent("better", CacheLevel.DRAM, evicted_bytes=2)
    assert choose([full, spare, better], W, tie=tie).order == ("better", "spare", "full")


candidate = st.builds(
    Candidate,
    agent=st.text("abcdef", min_size=1, max_size=3).map(AgentId),
    cache_level=st.sampled_from(CacheLevel),
    kv_hit_rate=st.floats(0, 1),
    queue_len=st.integers(0, 20),
    size_bytes=st.integers(0, 10**9),
    bandwidth_bytes_s=st.floats(1e6, 1e9),
    running=st.booleans(),
    evicted_bytes=st.integers(0, 2),
    excluded=st.none() | st.sampled_from(Exclusion),
)
candidates = st.lists(candidate, max_size=8, unique_by=lambda c: c.agent)
seconds = st.floats(0, 100)
weights = st.builds(Weights, alpha_s=seconds, beta_s=seconds, gamma_s=seconds)


@given(candidates, weights, st.integers(), st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(cs, w, tie, random) -> None:
    shuffled = [*cs]
    random.shuffle(shuffled)
    assert choose(cs, w, tie=tie) == choose(shuffled, w, tie=tie)


@given(candidates, weights, st.integers())
def test_the_excluded_are_never_asked_and_the_lowest_score_is_first(cs, w, tie) -> None:
    decision = choose(cs, w, tie=tie)
    allowed = {c.agent for c in cs if c.excluded is None}
    assert set(decision.order) == allowed
    assert {r.agent for r in decision.rows} == {c.agent for c in cs}
    scores = [r.score_s for r in decision.rows if r.excluded is None]
    assert scores == sorted(scores)
    assert [r.agent for r in decision.rows if r.chosen] == list(decision.order[:1])
    assert decision.winner == (decision.order[0] if allowed else None)


@given(candidates, weights, candidate)
def test_an_excluded_agent_changes_nothing_for_the_others(cs, w, other) -> None:
    assume(all(c.agent != other.agent for c in cs))
    other = msgspec.structs.replace(other, excluded=Exclusion.NO_ROOM)
    assert choose([*cs, other], w).order == choose(cs, w).order


@given(
    st.integers(0, 50), st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 10**10),
    st.sampled_from([CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.STORE]),
)  # fmt: skip
def test_scale_out_happens_exactly_when_the_queue_costs_more(
    queue_len, alpha_s, gamma_s, size_bytes, level
) -> None:
    """No autoscaler: the warm agent loses when its queue costs more than a load elsewhere."""
    w = Weights(alpha_s=alpha_s, beta_s=0.0, gamma_s=gamma_s)
    warm = agent("a-warm", queue_len=queue_len)
    cold = agent("z-cold", level, size_bytes=size_bytes, bandwidth_bytes_s=1e9)
    load_s = alpha_s * level + size_bytes / 1e9
    scaled_out = choose([warm, cold], w).winner == "z-cold"
    assert scaled_out == (load_s < gamma_s * queue_len)


def test_ties_go_round_by_the_callers_number() -> None:
    equal = [agent("c"), agent("a"), agent("b"), agent("worse", queue_len=1)]
    orders = [choose(equal, W, tie=i).order for i in range(4)]
    assert orders[0] == ("a", "b", "c", "worse")
    assert orders[1] == ("b", "c", "a", "worse")
    assert orders[2] == ("c", "a", "b", "worse")
    assert orders[3] == orders[0]


def test_nobody_to_ask() -> None:
    assert choose([], W).winner is None
    assert choose([agent("a", excluded=Exclusion.NOT_ACCEPTING)], W).order == ()


def test_the_table_says_why() -> None:
    decision = choose(
        [
            agent("cold", CacheLevel.NVME, size_bytes=10**9, bandwidth_bytes_s=5e8),
            agent("warm", kv_hit_rate=0.5, queue_len=1),
            agent("gone", excluded=Exclusion.REFUSED, reason="queue_full"),
        ],
        W,
    )
    table = [dict(zip(EXPLAIN_COLUMNS, row, strict=True)) for row in explain(decision)]
    assert [(r["agent"], r["score"], r["verdict"]) for r in table] == [
        ("warm", "1.750 s", "chosen"),
        ("cold", "4.000 s", ""),
        ("gone", "0.000 s", "refused before: queue_full"),
    ]
    assert table[1]["tier"] == "nvme"
    assert table[1]["δ·size/bw"] == "2.000 s"
    rows = msgspec.json.decode(msgspec.json.encode(decision))["rows"]
    assert rows[0]["terms"] == {"cache_s": 0.0, "kv_s": -0.25, "queue_s": 2.0, "move_s": 0.0}


@given(candidates, st.integers(0, 5))
def test_replicas_are_limited_to_those_that_run(cs, max_replicas) -> None:
    running = {c.agent for c in cs if c.running}
    limited = limit_replicas(cs, max_replicas)
    allowed = set(choose(limited, W).order)
    before = set(choose(cs, W).order)
    if len(running) < max_replicas:
        assert allowed == before
    else:
        assert allowed == before & running
