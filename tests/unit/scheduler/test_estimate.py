"""From an agent's record to a candidate; figures that are learned."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.cluster import AgentRecord, CacheLevel, ModelOnAgent, TierUsage
from serverlessllm.core.ids import Address, AgentId, Epoch, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.units import GIB, MIB
from serverlessllm.scheduler.choose import Candidate, Exclusion
from serverlessllm.scheduler.estimate import (
    bytes_to_move,
    candidate,
    learn,
    learn_bandwidth,
    predict_ttft_s,
    requests_ahead,
    slowest_hop_bytes_s,
    weights,
)
from serverlessllm.scheduler.score import Weights
from serverlessllm.scheduler.settings import SchedulerSettings

M = ModelId("m")
S = SchedulerSettings()
CPU, GPU = ("cpu",), ("cuda:0",)


def agent(*models: ModelOnAgent, dram: int = 8 * GIB, pinned: int = 0, **fields) -> AgentRecord:
    record = AgentRecord(
        agent=AgentId("a"),
        epoch=Epoch(1),
        address=Address("unix:/a"),
        backends=("llamacpp",),
        dram=TierUsage(budget_bytes=dram, used_bytes=pinned, pinned_bytes=pinned),
        nvme=TierUsage(budget_bytes=100 * GIB, used_bytes=0),
        models=models,
    )
    return msgspec.structs.replace(record, **fields)


def seen(record: AgentRecord, **fields) -> Candidate:
    given = {"size_bytes": GIB, "backend": "llamacpp", "settings": S, **fields}
    return candidate(record, M, **given)


def test_the_first_sample_is_taken_whole_and_later_ones_by_their_gain() -> None:
    assert learn(None, 4.0, 0.3) == 4.0
    assert learn(4.0, 2.0, 0.5) == 3.0


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1))
def test_an_average_stays_between_what_it_knew_and_what_it_saw(old, sample, gain) -> None:
    new = learn(old, sample, gain)
    assert min(old, sample) * (1 - 1e-9) - 1e-9 <= new <= max(old, sample) * (1 + 1e-9) + 1e-9


def test_bandwidth_is_learned_from_what_is_long_enough() -> None:
    assert learn_bandwidth(None, 100 * MIB, 2.0, 0.3) == 50 * MIB
    assert learn_bandwidth(50.0 * MIB, 4096, 1e-6, 0.3) == 50 * MIB
    assert learn_bandwidth(None, 100 * MIB, 0.0, 0.3) is None


@pytest.mark.parametrize(
    ("held", "slots", "ahead"),
    [(0, 1, 0), (1, 1, 1), (5, 1, 5), (0, 4, 0), (3, 4, 0), (4, 4, 1), (6, 4, 3), (2, 0, 2)],
)
def test_only_requests_that_hold_up_a_new_one_count(held: int, slots: int, ahead: int) -> None:
    assert requests_ahead(held, slots) == ahead


@pytest.mark.parametrize(
    ("level", "devices", "moves"),
    [
        (CacheLevel.DEVICE, CPU, False),
        (CacheLevel.DRAM, CPU, False),  # the engine maps it where it lies
        (CacheLevel.DRAM, GPU, True),
        (CacheLevel.NVME, CPU, True),
        (CacheLevel.STORE, GPU, True),
        (CacheLevel.DEVICE, GPU, False),
    ],
)
def test_bytes_that_still_have_to_move(level, devices, moves) -> None:
    assert bytes_to_move(level, 1000, devices) == (1000 if moves else 0)


def test_the_slowest_hop_on_the_way_sets_the_pace() -> None:
    measured = {"store→nvme": 100.0, "nvme→dram": 500.0, "dram→device": 50.0}
    assert slowest_hop_bytes_s(CacheLevel.STORE, measured, CPU, S) == 100
    assert slowest_hop_bytes_s(CacheLevel.STORE, measured, GPU, S) == 50
    assert slowest_hop_bytes_s(CacheLevel.NVME, measured, CPU, S) == 500
    assert slowest_hop_bytes_s(CacheLevel.DRAM, measured, GPU, S) == 50
    assert slowest_hop_bytes_s(CacheLevel.STORE, {}, CPU, S) == S.store_bytes_s
    assert slowest_hop_bytes_s(CacheLevel.NVME, {"nvme→dram": 0.0}, CPU, S) == S.nvme_bytes_s
    assert slowest_hop_bytes_s(CacheLevel.DEVICE, {}, CPU, S) > 0


def test_an_agent_that_never_saw_the_model_is_a_cold_candidate() -> None:
    c = seen(agent(bandwidth={"store→nvme": 1e8}))
    assert (c.cache_level, c.size_bytes, c.bandwidth_bytes_s) == (CacheLevel.STORE, GIB, 1e8)
    assert (c.excluded, c.running, c.queue_len, c.start_s) == (None, False, 0, None)


def test_what_an_agent_must_evict_for_a_model() -> None:
    room = agent(dram=2 * GIB, pinned=GIB)
    there = agent(ModelOnAgent(model=M, cache_level=CacheLevel.DRAM), dram=2 * GIB, pinned=2 * GIB)
    assert seen(room, size_bytes=GIB).evicted_bytes == 0
    assert seen(room, size_bytes=GIB + 5).evicted_bytes == 5
    assert seen(there, size_bytes=GIB).evicted_bytes == 0


def test_an_agent_that_has_it_ready() -> None:
    known = ModelOnAgent(
        model=M,
        cache_level=CacheLevel.DEVICE,
        state=InstanceState.READY,
        kv_hit_rate=0.4,
        queue_len=5,
        slots=4,
        start_s=1.1,
        service_s=0.8,
    )
    c = seen(agent(known))
    assert (c.size_bytes, c.queue_len, c.running) == (0, 2, True)
    assert (c.kv_hit_rate, c.start_s, c.service_s, c.slots) == (0.4, 1.1, 0.8, 4)
    assert seen(agent(known), held=9).queue_len == 6


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"record": agent(accepting=False)}, Exclusion.NOT_ACCEPTING),
        ({"record": agent(), "backend": "vllm"}, Exclusion.NO_BACKEND),
        ({"record": agent(dram=GIB // 2)}, Exclusion.NO_ROOM),
        ({"record": agent(), "refused": "queue_full"}, Exclusion.REFUSED),
        ({"record": agent(), "backend": None}, None),
        ({"record": agent(dram=2 * GIB, pinned=2 * GIB)}, None),  # it may be idle: ask
        ({"record": agent(dram=GIB // 2), "size_bytes": 0}, None),
        (
            {"record": agent(ModelOnAgent(model=M, cache_level=CacheLevel.DRAM), dram=GIB // 2)},
            None,
        ),
    ],
)
def test_who_is_not_asked_and_why(fields: dict[str, Any], why: Exclusion | None) -> None:
    c = seen(**fields)
    assert c.excluded == why
    assert bool(c.reason) == (why is not None)


def test_what_an_agent_says_of_itself_is_not_trusted_to_be_sane() -> None:
    known = ModelOnAgent(model=M, kv_hit_rate=7.0, queue_len=-3, slots=0)
    c = seen(agent(known, bandwidth={"store→nvme": -5.0}))
    assert (c.kv_hit_rate, c.queue_len, c.slots) == (1.0, 0, 1)
    assert c.bandwidth_bytes_s > 0


def test_weights_are_learned_in_seconds_or_set() -> None:
    knowing = [
        Candidate(agent=AgentId("a"), cache_level=CacheLevel.DEVICE, start_s=1.0, service_s=4.0),
        Candidate(
            agent=AgentId("b"), cache_level=CacheLevel.DRAM, start_s=3.0, service_s=4.0, slots=4
        ),
        Candidate(agent=AgentId("c"), cache_level=CacheLevel.STORE),
    ]
    assert weights(S, knowing) == Weights(alpha_s=2.0, beta_s=1.0, gamma_s=2.5, delta=1.0)
    assert weights(S, []) == Weights(alpha_s=2.0, beta_s=0.5, gamma_s=2.0, delta=1.0)
    fixed = SchedulerSettings(alpha_s=5, beta_s=0, gamma_s=7, delta=2)
    assert weights(fixed, knowing) == Weights(alpha_s=5, beta_s=0, gamma_s=7, delta=2)


def test_the_prediction_counts_each_second_once() -> None:
    cold = Candidate(
        agent=AgentId("a"),
        cache_level=CacheLevel.STORE,
        size_bytes=1000,
        bandwidth_bytes_s=500.0,
        start_s=1.0,
    )
    assert predict_ttft_s(cold, S, first_token_s=0.25) == 3.25
    warm = Candidate(
        agent=AgentId("a"), cache_level=CacheLevel.DEVICE, queue_len=3, service_s=2.0, slots=4
    )
    assert predict_ttft_s(warm, S) == 1.5
