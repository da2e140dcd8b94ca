"""The view, told to every worker: all of it once, then each change, encoded once for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from serverlessllm.core.ids import AgentId, KeyId, ModelId
from serverlessllm.orchestrator.view import AgentSeen, ClusterView
from serverlessllm.orchestrator.workers.messages import (
    AgentGone,
    AgentIs,
    KeyGone,
    KeyIs,
    KeysKnown,
    ModelGone,
    ModelIs,
    Snapshot,
    ToWorker,
    frame,
)


class Takes(Protocol):
    """`channel.Channel`, to a worker."""

    @property
    def full(self) -> bool: ...

    def send_frame(self, data: bytes) -> None: ...


class Subscription:
    """One worker: what it does not take in time is not kept for it, it gets a snapshot then."""

    def __init__(self, channel: Takes, snapshot: Callable[[], bytes]) -> None:
        self._channel = channel
        self._snapshot = snapshot
        self._behind = False
        channel.send_frame(snapshot())

    def tell(self, data: bytes) -> None:
        """A change; nothing is said to who does not keep up."""
        if self._behind or self._channel.full:
            self._behind = True
        else:
            self._channel.send_frame(data)

    def catch_up(self) -> None:
        """It has taken what was sent."""
        if self._behind:
            self._behind = False
            self._channel.send_frame(self._snapshot())


class Publisher:
    """Observes a view (`view.ObservesView`) for its subscribers."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view
        self._subscriptions: set[Subscription] = set()

    def subscribe(self, channel: Takes) -> Subscription:
        """Tell it everything, and from now on every change."""
        made = Subscription(channel, self._snapshot)
        self._subscriptions.add(made)
        return made

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    # What the view tells.

    def model_changed(self, model: ModelId) -> None:
        record = self._view.models.get(model)
        self._tell(ModelGone(model=model) if record is None else ModelIs(record=record))

    def agent_changed(self, agent: AgentId) -> None:
        seen = self._view.agents.get(agent)
        self._tell(AgentGone(agent=agent) if seen is None else _agent(seen))

    def key_changed(self, key: KeyId) -> None:
        record = next((each for each in self._view.api_keys.values() if each.id == key), None)
        self._tell(KeyGone(key=key) if record is None else KeyIs(key=record))

    def keys_are_known(self) -> None:
        self._tell(self._known())

    def _tell(self, message: ToWorker) -> None:
        if self._subscriptions:
            data = frame(message)
            for subscription in self._subscriptions:
                subscription.tell(data)

    def _snapshot(self) -> bytes:
        view = self._view
        return frame(
            Snapshot(
                models=tuple(view.models.values()),
                agents=tuple(map(_agent, view.agents.values())),
                api_keys=tuple(view.api_keys.values()),
                known=self._known(),
            )
        )

    def _known(self) -> KeysKnown:
        return KeysKnown(listed=self._view.listed, keys_asked=self._view.keys_asked)


def _agent(seen: AgentSeen) -> AgentIs:
    return AgentIs(
        record=seen.record, revision=seen.revision, seen_s=seen.seen_s, failed=seen.failed
    )
