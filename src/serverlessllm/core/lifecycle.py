"""The life of an instance: every transition, in one table."""

from __future__ import annotations

from enum import StrEnum


class InstanceState(StrEnum):
    """Where one backend process of one model on one agent is in its life."""

    QUEUED = "queued"
    """Accepted; waits for its turn or for room."""
    LOADING = "loading"
    """Its bytes move through the tiers."""
    STARTING = "starting"
    """Its backend process runs, but is not ready."""
    READY = "ready"
    """Serves requests."""
    DRAINING = "draining"
    """Takes no new request; finishes those it has."""
    STOPPED = "stopped"
    FAILED = "failed"


TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    InstanceState.QUEUED: frozenset(
        {InstanceState.LOADING, InstanceState.STOPPED, InstanceState.FAILED}
    ),
    InstanceState.LOADING: frozenset(
        {InstanceState.STARTING, InstanceState.STOPPED, InstanceState.FAILED}
    ),
    InstanceState.STARTING: frozenset(
        {InstanceState.READY, InstanceState.STOPPED, InstanceState.FAILED}
    ),
    InstanceState.READY: frozenset({InstanceState.DRAINING, InstanceState.FAILED}),
    InstanceState.DRAINING: frozenset({InstanceState.STOPPED, InstanceState.FAILED}),
    InstanceState.STOPPED: frozenset(),
    InstanceState.FAILED: frozenset(),
}


def advance(now: InstanceState, to: InstanceState) -> InstanceState:
    """The new state; a transition that the table lacks is a bug, not an event."""
    if to not in TRANSITIONS[now]:
        raise AssertionError(f"instance: no transition {now} → {to}")
    return to


def is_final(state: InstanceState) -> bool:
    """Whether nothing follows."""
    return not TRANSITIONS[state]
