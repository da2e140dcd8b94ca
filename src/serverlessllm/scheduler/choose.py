"""The choice: the agent with the lowest score, the others in order, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import groupby

import msgspec

from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.ids import AgentId
from serverlessllm.scheduler.score import Terms, Weights, score


class Exclusion(StrEnum):
    """Why an agent was not considered."""

    NOT_ACCEPTING = "not accepting"
    NO_BACKEND = "no backend"
    NO_ROOM = "no room"
    REFUSED = "refused before"
    ENOUGH_REPLICAS = "enough replicas"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One agent, as the score sees it; `estimate.candidate` makes it from an agent's record."""

    agent: AgentId
    cache_level: CacheLevel
    kv_hit_rate: float = 0.0
    queue_len: int = 0
    """Requests that a new one would wait behind (`estimate.requests_ahead`)."""
    size_bytes: int = 0
    """Bytes that still have to move to the device."""
    bandwidth_bytes_s: float = 1.0
    """Of the slowest hop on their way; > 0."""
    start_s: float | None = None
    """Learned start-up time of its backend; None: not known."""
    service_s: float | None = None
    """Learned mean service time of one request; None: not known."""
    slots: int = 1
    running: bool = False
    """It has an instance of the model, ready or on its way."""
    evicted_bytes: int = 0
    """What its DRAM tier must give up first: among equal scores, the one that loses least."""
    excluded: Exclusion | None = None
    reason: str = ""
    """Beside `excluded`, for people."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One agent of a decision: a line of `sllm explain`."""

    agent: AgentId
    tier: str
    cache_level: int
    kv_hit_rate: float
    queue_len: int
    size_bytes: int
    bandwidth_bytes_s: float
    terms: Terms
    score_s: float
    chosen: bool = False
    excluded: Exclusion | None = None
    reason: str = ""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to ask, in order, and the table that says why."""

    order: tuple[AgentId, ...]
    """Every agent that may be asked, best first."""
    rows: tuple[Row, ...]
    """All candidates: those of `order` in its order, then the excluded by name."""
    weights: Weights

    @property
    def winner(self) -> AgentId | None:
        """The agent to ask first; None when there is nobody to ask."""
        return self.order[0] if self.order else None


EXPLAIN_COLUMNS = (
    "agent", "tier", "α·level", "−β·kv", "γ·queue", "δ·size/bw", "score", "verdict",
)  # fmt: skip


def choose(candidates: Sequence[Candidate], weights: Weights, *, tie: int = 0) -> Decision:
    """Order the candidates by score.

    Of those who tie exactly, the one that evicts least comes first; `tie` breaks what is still
    equal: ordered by name and rotated by it, so that callers with different numbers (the count of
    their requests) spread. The result does not depend on the order of `candidates`.
    """
    by_name = sorted(candidates, key=lambda c: c.agent)
    rows = [_row(c, weights) for c in by_name]
    evicted_bytes = {c.agent: c.evicted_bytes for c in candidates}

    def rank(row: Row) -> tuple[float, int]:
        return row.score_s, evicted_bytes[row.agent]

    order: list[Row] = []
    for _, group in groupby(sorted((r for r in rows if r.excluded is None), key=rank), key=rank):
        equals = list(group)
        turn = tie % len(equals)
        order += equals[turn:] + equals[:turn]
    if order:
        order[0] = msgspec.structs.replace(order[0], chosen=True)
    return Decision(
        order=tuple(r.agent for r in order),
        rows=(*order, *(r for r in rows if r.excluded is not None)),
        weights=weights,
    )


def limit_replicas(candidates: Iterable[Candidate], max_replicas: int) -> tuple[Candidate, ...]:
    """Exclude agents without an instance once `max_replicas` others have one."""
    every = tuple(candidates)
    if sum(c.running for c in every) < max_replicas:
        return every
    return tuple(
        c
        if c.running or c.excluded is not None
        else msgspec.structs.replace(
            c,
            excluded=Exclusion.ENOUGH_REPLICAS,
            reason=f"max_replicas is {max_replicas}",
        )
        for c in every
    )


def explain(decision: Decision) -> list[tuple[str, ...]]:
    """The table of terms as text, one tuple a row, under `EXPLAIN_COLUMNS`."""
    return [
        (
            row.agent,
            row.tier,
            f"{row.terms.cache_s:.3f} s",
            f"{row.terms.kv_s:.3f} s",
            f"{row.terms.queue_s:.3f} s",
            f"{row.terms.move_s:.3f} s",
            f"{row.score_s:.3f} s",
            _verdict(row),
        )
        for row in decision.rows
    ]


def _verdict(row: Row) -> str:
    if row.excluded is not None:
        return f"{row.excluded}: {row.reason}" if row.reason else row.excluded
    return "chosen" if row.chosen else ""


def _row(candidate: Candidate, weights: Weights) -> Row:
    terms = score(
        weights,
        cache_level=candidate.cache_level,
        kv_hit_rate=candidate.kv_hit_rate,
        queue_len=candidate.queue_len,
        size_bytes=candidate.size_bytes,
        bandwidth_bytes_s=candidate.bandwidth_bytes_s,
    )
    return Row(
        agent=candidate.agent,
        tier=candidate.cache_level.tier,
        cache_level=candidate.cache_level,
        kv_hit_rate=candidate.kv_hit_rate,
        queue_len=candidate.queue_len,
        size_bytes=candidate.size_bytes,
        bandwidth_bytes_s=candidate.bandwidth_bytes_s,
        terms=terms,
        score_s=terms.score_s,
        excluded=candidate.excluded,
        reason=candidate.reason,
    )
