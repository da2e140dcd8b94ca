"""The main process's view and a worker's copy of it: the same after any history."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.apikeys import ApiKey
from serverlessllm.core.cluster import AgentRecord, ModelOnAgent, TierUsage
from serverlessllm.core.ids import Address, AgentId, Epoch, KeyId, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.orchestrator.router import Router
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.workers.messages import (
    HEAD_BYTES,
    AgentFailed,
    FromWorker,
    ModelLost,
    ToWorker,
    body_bytes,
)
from serverlessllm.orchestrator.workers.mirror import Mirror
from serverlessllm.orchestrator.workers.publisher import Publisher
from serverlessllm.scheduler.settings import SchedulerSettings
from serverlessllm.testing.clock import VirtualClock

_decoder = msgspec.msgpack.Decoder(ToWorker)
NAMES = st.sampled_from(["a", "b", "c"])
TIER = TierUsage(budget_bytes=1, used_bytes=0)


class Wire:
    """A channel to a worker in the same process, that may be full."""

    def __init__(self) -> None:
        self.told: list[FromWorker] = []
        self.mirror = Mirror(self.told.append)
        self.full = False
        self.frames = 0

    def send_frame(self, data: bytes) -> None:
        assert len(data) == HEAD_BYTES + body_bytes(data)
        self.frames += 1
        assert self.mirror.apply(_decoder.decode(data[HEAD_BYTES:]))


def same(view: ClusterView, mirror: ClusterView) -> bool:
    return (
        view.models == mirror.models
        and view.names == mirror.names
        and view.api_keys == mirror.api_keys
        and view.listed == mirror.listed
        and view.keys_asked == mirror.keys_asked
        and seen(view) == seen(mirror)
    )


def seen(view: ClusterView) -> dict[AgentId, object]:
    return {
        name: (each.record, each.revision, each.seen_s, each.failed, each.models, each.address)
        for name, each in view.agents.items()
    }


def model(name: str, alias: str = "") -> ModelRecord:
    return ModelRecord(spec=ModelSpec(model=ModelId(name), aliases=(alias,) if alias else ()))


def agent(name: str, epoch: int = 1, queue_len: int = 0, ready: bool = True) -> AgentRecord:
    on = ModelOnAgent(
        model=ModelId("m"),
        state=InstanceState.READY if ready else None,
        queue_len=queue_len,
        slots=4,
    )
    return AgentRecord(
        agent=AgentId(name),
        epoch=Epoch(epoch),
        address=Address(f"unix:/{name}-{epoch}"),
        dram=TIER,
        nvme=TIER,
        models=(on,),
    )


def key(name: str, revoked_s: int | None = None) -> ApiKey:
    return ApiKey(id=KeyId(name), name=name, sha256=name * 64, revoked_s=revoked_s)


CHANGES = st.one_of(
    st.tuples(st.just("put_model"), st.builds(model, NAMES, st.sampled_from(["", "x", "y"]))),
    st.tuples(st.just("drop_model"), NAMES),
    st.tuples(st.just("put_agent"), st.builds(agent, NAMES, st.integers(1, 2), st.integers(0, 3)),
              st.integers(1, 9), st.floats(0, 9)),
    st.tuples(st.just("drop_agent"), NAMES),
    st.tuples(st.just("failed"), NAMES),
    st.tuples(st.just("lost"), NAMES, st.just("m")),
    st.tuples(st.just("became_ready"), NAMES, st.just("m")),
    st.tuples(st.just("put_api_key"), st.builds(key, NAMES, st.none() | st.just(7))),
    st.tuples(st.just("drop_api_key"), NAMES),
    st.tuples(st.just("ask_for_keys")),
    st.tuples(st.just("is_listed")),
)  # fmt: skip


@given(
    before=st.lists(CHANGES, max_size=8),
    missed=st.lists(CHANGES, max_size=8),
    after=st.lists(CHANGES, max_size=8),
)
def test_a_copy_is_the_view_whatever_happens_and_whatever_it_missed(before, missed, after):
    view = ClusterView()
    view.observer = publisher = Publisher(view)

    def change(history):
        for verb, *arguments in history:
            getattr(view, verb)(*arguments)

    change(before)
    wire = Wire()
    subscription = publisher.subscribe(wire)
    assert same(view, wire.mirror)
    wire.full = True
    change(missed)
    wire.full = False
    subscription.catch_up()
    assert same(view, wire.mirror)
    change(after)
    assert same(view, wire.mirror)
    assert wire.told == []  # what it is told is not told back


def test_who_does_not_keep_up_is_sent_one_snapshot_then():
    view = ClusterView()
    view.observer = publisher = Publisher(view)
    wire = Wire()
    subscription = publisher.subscribe(wire)
    wire.full = True
    for number in range(50):
        view.put_model(model(f"m{number}"))
    assert wire.frames == 1
    wire.full = False
    view.put_model(model("late"))  # nothing may come before what was missed
    assert wire.frames == 1
    subscription.catch_up()
    assert wire.frames == 2
    assert len(wire.mirror.models) == 51
    subscription.catch_up()
    assert wire.frames == 2


def test_who_is_gone_is_told_nothing():
    view = ClusterView()
    view.observer = publisher = Publisher(view)
    wire = Wire()
    publisher.unsubscribe(publisher.subscribe(wire))
    view.put_model(model("m"))
    assert wire.frames == 1


def test_what_a_workers_requests_meet_is_noted_there_and_told_once():
    told: list[FromWorker] = []
    mirror = Mirror(told.append)
    mirror.mirror_agent(agent("a"), 1, 5.0, failed=False)
    mirror.failed(AgentId("a"))
    mirror.failed(AgentId("a"))
    mirror.failed(AgentId("nobody"))
    mirror.lost(AgentId("a"), ModelId("m"))
    assert told == [
        AgentFailed(agent=AgentId("a")),
        ModelLost(agent=AgentId("a"), model=ModelId("m")),
    ]
    assert mirror.agents[AgentId("a")].failed
    assert mirror.agents[AgentId("a")].models[ModelId("m")].state is None


def test_a_note_is_no_heartbeat():
    """Who probes an agent looks whether a heartbeat has come meanwhile: another entry."""
    mirror = Mirror(lambda _: None)
    mirror.mirror_agent(agent("a"), 1, 5.0, failed=False)
    before = mirror.agents[AgentId("a")]
    mirror.mirror_agent(agent("a"), 1, 5.0, failed=True)
    assert mirror.agents[AgentId("a")] is before
    mirror.mirror_agent(agent("a"), 2, 6.0, failed=False)
    assert mirror.agents[AgentId("a")] is not before


def test_requests_of_other_workers_are_those_that_the_agent_counted_beside_ours():
    view = ClusterView()
    view.observer = publisher = Publisher(view)
    view.put_model(model("m"))
    wires = [Wire(), Wire()]
    for wire in wires:
        publisher.subscribe(wire)
    clock = VirtualClock()
    routers = [Router(wire.mirror, SchedulerSettings(), 3.0, clock) for wire in wires]
    view.put_agent(agent("a"), 1, clock.now_s())

    def held(router: Router) -> int:
        lane = router._lanes[AgentId("a"), ModelId("m")]
        return lane.others + len(lane.leases)

    mine, theirs = routers
    leases = [mine.lease(ModelId("m")) for _ in range(2)] + [
        theirs.lease(ModelId("m")) for _ in range(3)
    ]
    for lease in leases:
        assert lease is not None
        lease.__enter__()
    assert (held(mine), held(theirs)) == (2, 3)  # no heartbeat has told of the others

    view.put_agent(agent("a", queue_len=5), 2, clock.now_s())
    for router in routers:
        assert router.lease(ModelId("m")) is not None
    assert (held(mine), held(theirs)) == (5, 5)

    view.failed(AgentId("a"))  # a note, not a count
    for router in routers:
        router.lease(ModelId("m"))
    assert (held(mine), held(theirs)) == (5, 5)
    for lease in leases:
        assert lease is not None
        lease.__exit__(None, None, None)
    assert (held(mine), held(theirs)) == (3, 2)  # until the next heartbeat, the others' are kept
