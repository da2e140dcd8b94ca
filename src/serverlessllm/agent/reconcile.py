"""What an agent does next, decided from facts alone: who starts, who stops, who is refused.

Pure: the owner in `instances.py` collects the facts, calls `reconcile`, and acts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum

import msgspec

from serverlessllm.core.ids import CheckpointId, InstanceId, ModelId
from serverlessllm.core.lifecycle import InstanceState


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance takes, or what there is: a vector that is added and compared."""

    memory_bytes: int = 0
    """Beside the weights."""
    dram_bytes: int = 0
    """Of the DRAM tier, for checkpoints in use."""
    instances: int = 0

    def plus(self, other: Room) -> Room:
        return Room(
            memory_bytes=self.memory_bytes + other.memory_bytes,
            dram_bytes=self.dram_bytes + other.dram_bytes,
            instances=self.instances + other.instances,
        )

    def within(self, limit: Room) -> bool:
        return (
            self.memory_bytes <= limit.memory_bytes
            and self.dram_bytes <= limit.dram_bytes
            and self.instances <= limit.instances
        )


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """One instance that has room: from its first admission until its process is gone."""

    instance: InstanceId
    model: ModelId
    state: InstanceState
    memory_bytes: int = 0
    checkpoint: CheckpointId | None = None
    checkpoint_bytes: int = 0
    """Shared by all instances of the checkpoint."""
    held: int = 0
    """Requests that run on it or wait for it."""
    ready_s: float = 0.0
    """When it became ready."""
    idle_s: float | None = None
    """Since when nobody uses it; None: it has not served a request yet."""
    keep_alive_s: float = 0.0
    """-1: never expires."""
    kept: bool = False
    """Neither expires nor is evicted: the operator wants it, or its bytes still move."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One instance that waits for room: for its checkpoint first, for its process later."""

    instance: InstanceId
    memory_bytes: int = 0
    checkpoint: CheckpointId | None = None
    checkpoint_bytes: int = 0
    instances: int = 0
    """1 with the first ask of an instance."""
    since_s: float
    not_before_s: float = 0.0
    """End of a pause after a crash."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that decide."""

    first_use_s: float
    room_wait_s_max: float


class Why(StrEnum):
    """Why an instance is stopped."""

    EXPIRED = "expired"
    EVICTED = "evicted"


class Admit(msgspec.Struct, frozen=True):
    """The instance has the room that it asked for."""

    instance: InstanceId


class Stop(msgspec.Struct, frozen=True):
    """Drain the (idle) instance."""

    instance: InstanceId
    why: Why


class Refuse(msgspec.Struct, frozen=True):
    """There is no room for the instance; `ever`: not even on an empty agent."""

    instance: InstanceId
    ever: bool


Action = Admit | Stop | Refuse


class Plan(msgspec.Struct, frozen=True):
    """What to do now, and when to look again if nothing happens before; None: no need."""

    actions: tuple[Action, ...]
    next_s: float | None


def reconcile(
    instances: Sequence[Facts], asks: Iterable[Ask], budget: Room, limits: Limits, now_s: float
) -> Plan:
    """Expire what is idle for too long, then give room in the order of asking.

    Whoever asks first is served first, those that hold their checkpoint already before those that
    do not; a later ask never takes room that an earlier one waits for, and a pause after a crash
    holds nobody else up. Idle instances are evicted, the longest
    idle first, only when that makes enough room together with what is stopping already.
    """
    actions: list[Action] = []
    deadlines: list[float] = []
    alive = list(instances)
    for facts in instances:
        at_s = expires_s(facts, limits)
        if at_s is None:
            continue
        if at_s <= now_s:
            actions.append(Stop(facts.instance, Why.EXPIRED))
            alive.remove(facts)
            alive.append(_stopping(facts))
        else:
            deadlines.append(at_s)
    admitted: list[Facts] = []
    for ask in sorted(asks, key=lambda ask: (ask.instances, ask.since_s)):
        if ask.not_before_s > now_s:
            deadlines.append(ask.not_before_s)
            continue
        used = _used([*alive, *admitted])
        if _with(used, ask, [*alive, *admitted]).within(budget):
            actions.append(Admit(ask.instance))
            admitted.append(_granted(ask))
            continue
        if not _with(Room(), ask, ()).within(budget):
            actions.append(Refuse(ask.instance, ever=True))
            continue
        refuse_s = max(ask.since_s, ask.not_before_s) + limits.room_wait_s_max
        if refuse_s <= now_s:
            actions.append(Refuse(ask.instance, ever=False))
            continue
        deadlines.append(refuse_s)
        for victim in _victims(alive, admitted, ask, budget, limits, now_s):
            actions.append(Stop(victim.instance, Why.EVICTED))
            alive.remove(victim)
            alive.append(_stopping(victim))
        deadlines += [s for facts in alive if (s := _spared_s(facts, limits)) > now_s]
        break  # everybody behind waits: what becomes free is for this one
    return Plan(tuple(actions), min(deadlines, default=None))


def expires_s(facts: Facts, limits: Limits) -> float | None:
    """When the instance's idle time is over; None: not while things are as they are."""
    if facts.state is not InstanceState.READY or facts.held or facts.kept:
        return None
    if facts.keep_alive_s < 0:
        return None
    if facts.idle_s is None:  # it was started for somebody who has yet to ask
        return facts.ready_s + max(facts.keep_alive_s, limits.first_use_s)
    return facts.idle_s + facts.keep_alive_s


def _spared_s(facts: Facts, limits: Limits) -> float:
    """Until when an idle instance is not evicted: it may be waited for right now."""
    if facts.state is not InstanceState.READY or facts.held or facts.kept:
        return 0.0
    return facts.ready_s + limits.first_use_s if facts.idle_s is None else 0.0


def _victims(
    alive: Sequence[Facts],
    admitted: Sequence[Facts],
    ask: Ask,
    budget: Room,
    limits: Limits,
    now_s: float,
) -> list[Facts]:
    """Idle instances whose end makes room for `ask`; none when that would not be enough."""
    staying = [facts for facts in alive if facts.state is not InstanceState.DRAINING]
    idle = sorted(
        (
            facts
            for facts in staying
            if facts.state is InstanceState.READY
            and not facts.held
            and not facts.kept
            and _spared_s(facts, limits) <= now_s
        ),
        key=lambda facts: facts.ready_s if facts.idle_s is None else facts.idle_s,
    )
    victims: list[Facts] = []
    while True:
        left = [*(facts for facts in staying if facts not in victims), *admitted]
        if _with(_used(left), ask, left).within(budget):
            return victims
        if not idle:
            return []
        victims.append(idle.pop(0))


def _used(instances: Collection[Facts]) -> Room:
    checkpoints = {f.checkpoint: f.checkpoint_bytes for f in instances if f.checkpoint is not None}
    return Room(
        memory_bytes=sum(facts.memory_bytes for facts in instances),
        dram_bytes=sum(checkpoints.values()),
        instances=len({facts.instance for facts in instances}),
    )


def _with(used: Room, ask: Ask, instances: Collection[Facts]) -> Room:
    """`used` with what is asked on top; a checkpoint that is there already takes nothing."""
    shared = any(facts.checkpoint == ask.checkpoint for facts in instances)
    dram_bytes = 0 if ask.checkpoint is None or shared else ask.checkpoint_bytes
    return used.plus(
        Room(memory_bytes=ask.memory_bytes, dram_bytes=dram_bytes, instances=ask.instances)
    )


def _granted(ask: Ask) -> Facts:
    return Facts(
        instance=ask.instance,
        model=ModelId(""),
        state=InstanceState.LOADING,
        memory_bytes=ask.memory_bytes,
        checkpoint=ask.checkpoint,
        checkpoint_bytes=ask.checkpoint_bytes,
    )


def _stopping(facts: Facts) -> Facts:
    return msgspec.structs.replace(facts, state=InstanceState.DRAINING)


class Crashes(msgspec.Struct, frozen=True):
    """When a model's backend crashed, oldest first; only as far back as the window."""

    at_s: tuple[float, ...] = ()

    def more(self, now_s: float, window_s: float) -> Crashes:
        """With one more, now."""
        return Crashes((*self.recent(now_s, window_s), now_s))

    def recent(self, now_s: float, window_s: float) -> tuple[float, ...]:
        """Those in the window."""
        return tuple(at for at in self.at_s if at > now_s - window_s)

    def looping_until_s(self, now_s: float, window_s: float, crashes_max: int) -> float | None:
        """While there are too many in the window: when there are fewer again; else None."""
        recent = self.recent(now_s, window_s)
        return recent[-crashes_max] + window_s if len(recent) >= crashes_max else None

    def restart_s(self, now_s: float, window_s: float, pause_s: float, pause_s_max: float) -> float:
        """The earliest time of the next start: the pause doubles with each recent crash."""
        recent = self.recent(now_s, window_s)
        if not recent:
            return now_s
        return recent[-1] + min(pause_s_max, pause_s * 2.0 ** (len(recent) - 1))


def silence_s_max(gaps_s: Sequence[float], floor_s: float, factor: float) -> float:
    """How long a busy instance may be silent before it is suspected to hang."""
    if not gaps_s:
        return floor_s
    ordered = sorted(gaps_s)
    return max(floor_s, factor * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))])
