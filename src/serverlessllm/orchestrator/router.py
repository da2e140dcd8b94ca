"""Which agent gets a request: the scheduler's score on the view and on our own requests.

For each model the score's terms that only heartbeats change are computed once a view version;
what is left for a request is `γ · requests ahead`, with this process's own requests counted as
they come and go. No lock, no I/O, no await.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Final

from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import Address, AgentId, ModelId
from serverlessllm.core.models import ModelRecord
from serverlessllm.orchestrator.loads import Placed
from serverlessllm.orchestrator.view import AgentSeen, ClusterView, is_ready
from serverlessllm.scheduler.choose import Candidate, Decision, choose, limit_replicas
from serverlessllm.scheduler.estimate import candidate, learn, predict_ttft_s, weights
from serverlessllm.scheduler.settings import SchedulerSettings

_SUSPECT_S: Final = 1e9
"""Added to a suspect's score: behind everybody who is not one, in order among themselves."""


class Lane:
    """One model on one agent, as this process uses it. Outlives heartbeats."""

    __slots__ = ("leases", "others", "revision")

    def __init__(self) -> None:
        self.leases: set[Lease] = set()
        self.others = 0
        """Requests that the agent's last heartbeat counted and that are not ours."""
        self.revision = -1


class _Row:
    """One agent in a model's table."""

    __slots__ = ("fixed_s", "lane", "seen", "service_s", "slots")

    def __init__(
        self, seen: AgentSeen, lane: Lane, slots: int, fixed_s: float, service_s: float
    ) -> None:
        self.seen = seen
        self.lane = lane
        self.slots = slots
        self.fixed_s = fixed_s
        """The score without its queue term."""
        self.service_s = service_s

    def ahead(self) -> int:
        """Requests that a new one waits behind (`estimate.requests_ahead`); not above 0: none."""
        lane = self.lane
        return lane.others + len(lane.leases) - self.slots + 1


class _Table:
    """What a lease needs of one model at one view version."""

    __slots__ = ("colder", "gamma_s", "ready", "version")

    def __init__(
        self, version: int, ready: tuple[_Row, ...], colder: tuple[_Row, ...], gamma_s: float
    ) -> None:
        self.version = version
        self.ready = ready
        self.colder = colder
        """Agents that could load it."""
        self.gamma_s = gamma_s


class Lease:
    """One request on one agent, from the choice until `with` ends."""

    __slots__ = ("_lane", "address", "agent", "idle", "predicted_s", "scale_out")

    def __init__(
        self,
        lane: Lane,
        seen: AgentSeen,
        predicted_s: float,
        *,
        idle: bool = False,
        scale_out: bool = False,
    ) -> None:
        self._lane = lane
        self.agent: AgentId = seen.agent
        self.address: Address = seen.address
        self.predicted_s = predicted_s
        """Until the first byte."""
        self.idle = idle
        """Nobody is ahead of this request there."""
        self.scale_out = scale_out
        """A load on another agent would have cost less than this one's queue."""

    def take(self) -> Lease:
        """From now on the request counts; `give_back` ends it. A context manager does both."""
        self._lane.leases.add(self)
        return self

    def give_back(self) -> None:
        """Safe to say twice."""
        self._lane.leases.discard(self)

    def __enter__(self) -> Lease:
        return self.take()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lane.leases.discard(self)


class Router:
    """Choices on the view. Belongs to the event loop's thread, as the view does."""

    def __init__(
        self, view: ClusterView, settings: SchedulerSettings, agent_silent_s: float, clock: Clock
    ) -> None:
        self._view = view
        self._settings = settings
        self._silent_s = agent_silent_s
        self._clock = clock
        self._tables: dict[ModelId, _Table] = {}
        self._lanes: dict[tuple[AgentId, ModelId], Lane] = {}
        self._first_token_s: dict[ModelId, float] = {}
        self._turn = 0

    @property
    def in_flight(self) -> int:
        """Requests of ours on agents."""
        return sum(len(lane.leases) for lane in self._lanes.values())

    def lease(self, model: ModelId, avoid: Collection[AgentId] = ()) -> Lease | None:
        """The best ready agent outside `avoid`; None when the model is ready on none."""
        table = self._tables.get(model)
        if table is None or table.version != self._view.version:
            table = self._build(model)
        rows = table.ready
        if len(rows) == 1 and not avoid and rows[0].ahead() <= 0:
            row = rows[0]  # nobody to compare it with, no queue to compare with a load
            return Lease(row.lane, row.seen, self._first_token_s.get(model, 0.0), idle=True)
        now_s = self._clock.now_s()
        if len(rows) > 1:
            self._turn += 1
            turn = self._turn % len(rows)
            rows = rows[turn:] + rows[:turn]
        best, best_s, best_ahead = None, 0.0, 0
        for row in rows:
            if avoid and row.seen.agent in avoid:
                continue
            ahead = row.ahead()
            score_s = row.fixed_s + table.gamma_s * ahead if ahead > 0 else row.fixed_s
            if row.seen.suspect(now_s, self._silent_s):
                score_s += _SUSPECT_S
            if best is None or score_s < best_s:
                best, best_s, best_ahead = row, score_s, ahead
        if best is None:
            return None
        predicted_s = self._first_token_s.get(model, 0.0)
        scale_out = False
        if best_ahead > 0:
            predicted_s += best_ahead * best.service_s / best.slots
            scale_out = any(
                row.fixed_s + table.gamma_s * max(0, row.ahead()) < best_s
                and not row.seen.suspect(now_s, self._silent_s)
                for row in table.colder
            )
        seen = best.seen
        return Lease(best.lane, seen, predicted_s, idle=best_ahead <= 0, scale_out=scale_out)

    def lease_on(self, agent: AgentId, model: ModelId, predicted_s: float) -> Lease | None:
        """A lease on the agent that has just loaded the model; None if it has gone since."""
        seen = self._view.agents.get(agent)
        if seen is None:
            return None
        return Lease(self._lane(agent, model), seen, predicted_s)

    def place(self, record: ModelRecord, avoid: Collection[AgentId]) -> Placed | None:
        """The best agent for a load; None when none may be asked."""
        candidates, decision = self._decide(record, avoid)
        winner = decision.winner
        if winner is None:
            return None
        chosen = next(c for c in candidates if c.agent == winner)
        seen = self._view.agents[winner]
        return Placed(
            agent=winner,
            epoch=seen.record.epoch,
            address=seen.address,
            cache_level=chosen.cache_level,
            predicted_s=predict_ttft_s(chosen, self._settings),
        )

    def explain(self, record: ModelRecord) -> Decision:
        """The scheduler's whole table for a request that came now."""
        return self._decide(record, ())[1]

    def learn_first_token(self, model: ModelId, seconds: float) -> None:
        """What an answer took to its first byte on an idle, ready instance."""
        known = self._first_token_s.get(model)
        self._first_token_s[model] = learn(known, seconds, self._settings.learning_gain)

    def agents_held(self) -> dict[AgentId, Address]:
        """The agents that have requests of ours, and where those were sent."""
        return {
            lease.agent: lease.address for lane in self._lanes.values() for lease in lane.leases
        }

    def _build(self, model: ModelId) -> _Table:
        """The model's table at the view's present version."""
        record = self._view.models.get(model)
        if record is None:
            self._tables.pop(model, None)
            return _Table(self._view.version, (), (), 0.0)
        candidates = limit_replicas(self._candidates(record, {}), record.spec.max_replicas)
        learned = weights(self._settings, candidates)
        fixed_s = {
            row.agent: row.score_s - row.terms.queue_s for row in choose(candidates, learned).rows
        }
        ready: list[_Row] = []
        colder: list[_Row] = []
        for each in candidates:
            if each.excluded is not None:
                continue
            seen = self._view.agents[each.agent]
            on = seen.models.get(model)
            service_s = self._settings.service_s if each.service_s is None else each.service_s
            lane = self._lane(each.agent, model)
            row = _Row(seen, lane, each.slots, fixed_s[each.agent], service_s)
            (ready if on is not None and is_ready(on) else colder).append(row)
        table = _Table(self._view.version, tuple(ready), tuple(colder), learned.gamma_s)
        self._tables[model] = table
        self._forget_gone()
        return table

    def _decide(
        self, record: ModelRecord, avoid: Collection[AgentId]
    ) -> tuple[tuple[Candidate, ...], Decision]:
        """The scheduler's choice, suspects only if there is nobody else."""
        now_s = self._clock.now_s()
        refused = dict.fromkeys(avoid, "asked before")
        suspects = {
            seen.agent: "silent, or failed a request"
            for seen in self._view.agents.values()
            if seen.suspect(now_s, self._silent_s)
        }
        for held_back in ({**suspects, **refused}, refused):
            candidates = limit_replicas(
                self._candidates(record, held_back), record.spec.max_replicas
            )
            decision = choose(candidates, weights(self._settings, candidates), tie=self._turn)
            if decision.winner is not None or not suspects:
                break
        self._turn += 1
        return candidates, decision

    def _candidates(
        self, record: ModelRecord, refused: Mapping[AgentId, str]
    ) -> tuple[Candidate, ...]:
        model = record.spec.model
        found = []
        for seen in self._view.agents.values():
            lane = self._lane(seen.agent, model)
            if lane.revision != seen.revision:
                on = seen.models.get(model)
                lane.others = max(0, (on.queue_len if on else 0) - len(lane.leases))
                lane.revision = seen.revision
            found.append(
                candidate(
                    seen.record,
                    model,
                    size_bytes=record.checkpoint.size_bytes if record.checkpoint else 0,
                    backend=record.spec.backend,
                    settings=self._settings,
                    held=lane.others + len(lane.leases),
                    refused=refused.get(seen.agent),
                )
            )
        return tuple(found)

    def _lane(self, agent: AgentId, model: ModelId) -> Lane:
        lane = self._lanes.get((agent, model))
        if lane is None:
            lane = self._lanes[agent, model] = Lane()
        return lane

    def _forget_gone(self) -> None:
        """Drop the lanes and figures of agents and models that the view has no more."""
        agents, models = self._view.agents, self._view.models
        for key in [
            (agent, model)
            for (agent, model), lane in self._lanes.items()
            if not lane.leases and (agent not in agents or model not in models)
        ]:
            del self._lanes[key]
        for model in self._first_token_s.keys() - models.keys():
            del self._first_token_s[model]
