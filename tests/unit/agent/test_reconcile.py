"""What the agent decides: expiry, room, eviction, order, back-off; examples and properties."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.agent.reconcile import (
    Action,
    Admit,
    Ask,
    Crashes,
    Facts,
    Limits,
    Refuse,
    Room,
    Stop,
    Why,
    reconcile,
    silence_s_max,
)
from serverlessllm.core.ids import CheckpointId, InstanceId, ModelId
from serverlessllm.core.lifecycle import InstanceState

NOW_S = 1000.0
LIMITS = Limits(first_use_s=10.0, room_wait_s_max=30.0)
BUDGET = Room(memory_bytes=100, dram_bytes=100, instances=4)


def ready(name: str, **fields: object) -> Facts:
    """Idle for 50 s, with 40 bytes of memory and 40 of DRAM."""
    facts = Facts(
        instance=InstanceId(name),
        model=ModelId(name),
        state=InstanceState.READY,
        memory_bytes=40,
        checkpoint=CheckpointId(name),
        checkpoint_bytes=40,
        ready_s=NOW_S - 100,
        idle_s=NOW_S - 50,
        keep_alive_s=300.0,
    )
    return msgspec.structs.replace(facts, **fields)


def ask(name: str = "new", **fields: object) -> Ask:
    default = Ask(
        instance=InstanceId(name),
        memory_bytes=40,
        checkpoint=CheckpointId(name),
        checkpoint_bytes=40,
        instances=1,
        since_s=NOW_S,
    )
    return msgspec.structs.replace(default, **fields)


def decide(
    instances: list[Facts], *asks: Ask, now_s: float = NOW_S, budget: Room = BUDGET
) -> tuple[Action, ...]:
    return reconcile(instances, asks, budget, LIMITS, now_s).actions


class TestExpiry:
    """Idle time, from the last request's end."""

    def test_idle_for_its_keep_alive(self) -> None:
        assert decide([ready("a", keep_alive_s=50.0)]) == (Stop(InstanceId("a"), Why.EXPIRED),)
        plan = reconcile([ready("a", keep_alive_s=51.0)], [], BUDGET, LIMITS, NOW_S)
        assert plan.actions == ()
        assert plan.next_s == NOW_S + 1

    def test_zero_ends_it_with_its_last_request(self) -> None:
        assert decide([ready("a", keep_alive_s=0.0, idle_s=NOW_S)])

    def test_minus_one_never(self) -> None:
        plan = reconcile([ready("a", keep_alive_s=-1.0)], [], BUDGET, LIMITS, NOW_S + 1e9)
        assert plan.actions == ()
        assert plan.next_s is None

    def test_a_fresh_one_waits_for_its_first_request(self) -> None:
        fresh = ready("a", keep_alive_s=0.0, idle_s=None, ready_s=NOW_S)
        assert decide([fresh], now_s=NOW_S + 9.9) == ()
        assert decide([fresh], now_s=NOW_S + 10)

    @pytest.mark.parametrize(
        "fields",
        [{"held": 1}, {"kept": True}, {"state": InstanceState.STARTING}],
        ids=["busy", "kept", "not ready"],
    )
    def test_not_while(self, fields: dict[str, object]) -> None:
        assert decide([ready("a", keep_alive_s=0.0, **fields)]) == ()


class TestRoom:
    """Who gets in, and at whose cost."""

    def test_there_is_room(self) -> None:
        assert decide([ready("a")], ask()) == (Admit(InstanceId("new")),)

    def test_the_longest_idle_makes_room_and_is_waited_for(self) -> None:
        instances = [ready("a"), ready("b", idle_s=NOW_S - 60)]
        assert decide(instances, ask()) == (Stop(InstanceId("b"), Why.EVICTED),)
        stopping = [ready("a"), ready("b", state=InstanceState.DRAINING)]
        assert decide(stopping, ask()) == ()
        assert decide([ready("a")], ask()) == (Admit(InstanceId("new")),)

    def test_nobody_is_evicted_for_nothing(self) -> None:
        instances = [ready("a"), ready("b", held=1, memory_bytes=50)]
        assert decide(instances, ask(memory_bytes=60)) == ()

    @pytest.mark.parametrize(
        "fields",
        [
            {"held": 1},
            {"kept": True},
            {"idle_s": None, "ready_s": NOW_S - 1},
            {"state": InstanceState.STARTING},
            {"state": InstanceState.LOADING},
        ],
        ids=["busy", "kept", "for its first request", "starting", "loading"],
    )
    def test_who_is_not_evicted(self, fields: dict[str, object]) -> None:
        instances = [ready("a", **fields), ready("b", **fields)]
        assert decide(instances, ask()) == ()

    def test_what_is_kept_for_its_first_request_can_go_later(self) -> None:
        fresh = [ready(name, idle_s=None, ready_s=NOW_S - 4) for name in "ab"]
        plan = reconcile(fresh, [ask()], BUDGET, LIMITS, NOW_S)
        assert plan.next_s == NOW_S + 6
        assert decide(fresh, ask(), now_s=NOW_S + 6)

    def test_a_checkpoint_in_use_takes_no_more_dram(self) -> None:
        shared = ask(checkpoint=CheckpointId("a"), checkpoint_bytes=40, memory_bytes=0)
        tight = msgspec.structs.replace(BUDGET, dram_bytes=40)
        assert decide([ready("a")], shared, budget=tight) == (Admit(InstanceId("new")),)

    def test_too_many_instances(self) -> None:
        small = [ready(f"i{n}", memory_bytes=1, checkpoint_bytes=1, held=1) for n in range(4)]
        assert decide(small, ask(memory_bytes=1, checkpoint_bytes=1)) == ()

    def test_what_never_fits_is_refused_at_once_and_holds_nobody_up(self) -> None:
        actions = decide([], ask("huge", memory_bytes=101), ask("small"))
        assert actions == (Refuse(InstanceId("huge"), ever=True), Admit(InstanceId("small")))

    def test_waiting_ends(self) -> None:
        busy = [ready("a", held=1), ready("b", held=1)]
        plan = reconcile(busy, [ask()], BUDGET, LIMITS, NOW_S)
        assert plan.next_s == NOW_S + 30
        refused = (Refuse(InstanceId("new"), ever=False),)
        assert decide(busy, ask(), now_s=NOW_S + 30) == refused

    def test_first_come_first_served(self) -> None:
        busy = [ready("a", held=1, memory_bytes=70)]
        asks = (ask("late", memory_bytes=10), ask("early", memory_bytes=40, since_s=NOW_S - 1))
        assert decide(busy, *asks) == ()

    def test_who_holds_a_checkpoint_already_is_not_held_up_by_who_wants_one(self) -> None:
        loaded = ready("loaded", state=InstanceState.LOADING, memory_bytes=0)
        busy = ready("a", held=1)
        second = ask("loaded", checkpoint=None, checkpoint_bytes=0, instances=0)
        actions = decide([loaded, busy], ask("early", since_s=NOW_S - 5), second)
        assert actions == (Admit(InstanceId("loaded")),)

    def test_a_pause_after_a_crash_holds_nobody_up(self) -> None:
        plan = reconcile(
            [], [ask("crashed", not_before_s=NOW_S + 2), ask("b")], BUDGET, LIMITS, NOW_S
        )
        assert plan.actions == (Admit(InstanceId("b")),)
        assert plan.next_s == NOW_S + 2


class TestCrashes:
    """Back-off, and when to give up."""

    def test_the_pause_doubles_up_to_its_bound(self) -> None:
        crashes, pauses = Crashes(), []
        for _ in range(8):
            crashes = crashes.more(NOW_S, 60.0)
            pauses.append(crashes.restart_s(NOW_S, 60.0, 0.5, 30.0) - NOW_S)
        assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]

    def test_five_in_a_minute_are_a_loop_until_the_first_is_a_minute_old(self) -> None:
        crashes = Crashes()
        for number in range(5):
            assert crashes.looping_until_s(NOW_S + 4, 60.0, 5) is None
            crashes = crashes.more(NOW_S + number, 60.0)
        assert crashes.looping_until_s(NOW_S + 4, 60.0, 5) == NOW_S + 60
        assert crashes.looping_until_s(NOW_S + 61, 60.0, 5) is None

    def test_old_ones_are_forgotten(self) -> None:
        crashes = Crashes().more(NOW_S, 60.0).more(NOW_S + 61, 60.0)
        assert crashes.at_s == (NOW_S + 61,)
        assert Crashes().restart_s(NOW_S, 60.0, 0.5, 30.0) == NOW_S


def test_silence_is_judged_by_the_gaps_there_were() -> None:
    assert silence_s_max([], 10.0, 20.0) == 10.0
    assert silence_s_max([0.02] * 200, 10.0, 20.0) == 10.0
    assert silence_s_max([0.0] * 50 + [2.0] * 50, 10.0, 20.0) == 40.0


NAMES = st.sampled_from("abcdef")
FACTS = st.builds(
    Facts,
    instance=NAMES.map(InstanceId),
    model=NAMES.map(ModelId),
    state=st.sampled_from(
        [
            InstanceState.LOADING,
            InstanceState.STARTING,
            InstanceState.READY,
            InstanceState.READY,
            InstanceState.DRAINING,
        ]
    ),
    memory_bytes=st.integers(0, 60),
    checkpoint=st.none() | NAMES.map(CheckpointId),
    checkpoint_bytes=st.just(30),
    held=st.integers(0, 2),
    ready_s=st.floats(900, 1000),
    idle_s=st.none() | st.floats(900, 1000),
    keep_alive_s=st.sampled_from([-1.0, 0.0, 40.0, 300.0]),
    kept=st.booleans(),
)
ASKS = st.builds(
    Ask,
    instance=st.sampled_from("uvwxyz").map(InstanceId),
    memory_bytes=st.integers(0, 120),
    checkpoint=st.none() | NAMES.map(CheckpointId),
    checkpoint_bytes=st.just(30),
    instances=st.just(1),
    since_s=st.floats(960, 1000),
    not_before_s=st.sampled_from([0.0, 0.0, 1001.0]),
)
ALIVE = st.lists(FACTS, max_size=6, unique_by=lambda facts: facts.instance)
ASKING = st.lists(ASKS, max_size=4, unique_by=lambda ask: ask.instance)


@given(ALIVE, ASKING)
def test_nobody_in_use_is_ever_stopped(instances: list[Facts], asks: list[Ask]) -> None:
    facts = {each.instance: each for each in instances}
    for action in decide(instances, *asks):
        if isinstance(action, Stop):
            stopped = facts[action.instance]
            assert stopped.state is InstanceState.READY
            assert not stopped.held
            assert not stopped.kept


@given(ALIVE, ASKING)
def test_what_is_admitted_fits_beside_all_that_still_lives(
    instances: list[Facts], asks: list[Ask]
) -> None:
    admitted = {a.instance for a in decide(instances, *asks) if isinstance(a, Admit)}
    inside = [each for each in asks if each.instance in admitted]
    memory_bytes = sum(f.memory_bytes for f in instances) + sum(a.memory_bytes for a in inside)
    checkpoints = {f.checkpoint for f in instances} | {a.checkpoint for a in inside}
    checkpoints -= {None}
    if inside:
        assert memory_bytes <= BUDGET.memory_bytes
        assert 30 * len(checkpoints) <= BUDGET.dram_bytes
        assert len(instances) + len(inside) <= BUDGET.instances


@given(ALIVE, ASKING)
def test_each_action_is_for_somebody_and_at_most_one(
    instances: list[Facts], asks: list[Ask]
) -> None:
    actions = decide(instances, *asks)
    targets = [action.instance for action in actions]
    assert len(targets) == len(set(targets))
    asking = {each.instance for each in asks}
    for action in actions:
        assert (action.instance in asking) is not isinstance(action, Stop)


@given(ALIVE, ASKING)
def test_whoever_is_left_waiting_is_looked_at_again(
    instances: list[Facts], asks: list[Ask]
) -> None:
    plan = reconcile(instances, asks, BUDGET, LIMITS, NOW_S)
    answered = {action.instance for action in plan.actions}
    if any(each.instance not in answered for each in asks):
        assert plan.next_s is not None
    assert plan.next_s is None or plan.next_s > NOW_S


@given(ALIVE, ASKING)
def test_doing_it_and_deciding_again_comes_to_rest(instances: list[Facts], asks: list[Ask]) -> None:
    stopped = {a.instance for a in decide(instances, *asks) if isinstance(a, Stop)}
    answered = {a.instance for a in decide(instances, *asks)}
    after = [
        msgspec.structs.replace(each, state=InstanceState.DRAINING)
        if each.instance in stopped
        else each
        for each in instances
    ]
    left = [each for each in asks if each.instance not in answered]
    admitted = [each for each in asks if each.instance in answered - stopped]
    if not admitted:
        assert not [a for a in decide(after, *left) if isinstance(a, Stop)]
