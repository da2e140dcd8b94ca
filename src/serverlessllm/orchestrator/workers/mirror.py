"""A worker's own view: a copy of the main process's, and what the worker meets told back to it."""

from __future__ import annotations

from collections.abc import Callable

from serverlessllm.core.ids import AgentId, ModelId
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.workers.messages import (
    AgentFailed,
    AgentGone,
    AgentIs,
    FromWorker,
    KeyGone,
    KeyIs,
    KeysKnown,
    ModelGone,
    ModelIs,
    ModelLost,
    Snapshot,
    ToWorker,
)


class Mirror(ClusterView):
    """Read as any view. `tell` sends to the main process what requests note here."""

    def __init__(self, tell: Callable[[FromWorker], None]) -> None:
        super().__init__()
        self._tell = tell

    def failed(self, agent: AgentId) -> None:
        seen = self.agents.get(agent)
        if seen is not None and not seen.failed:
            self._tell(AgentFailed(agent=agent))
        super().failed(agent)

    def lost(self, agent: AgentId, model: ModelId) -> None:
        self._tell(ModelLost(agent=agent, model=model))
        super().lost(agent, model)

    def apply(self, message: ToWorker) -> bool:
        """Whether the message was about the view."""
        match message:
            case AgentIs():
                self._put_agent(message)
            case AgentGone(agent=agent):
                self.drop_agent(agent)
            case ModelIs(record=record):
                self.put_model(record)
            case ModelGone(model=model):
                self.drop_model(model)
            case KeyIs(key=key):
                self.put_api_key(key)
            case KeyGone(key=key_id):
                self.drop_api_key(key_id)
            case KeysKnown():
                self._know(message)
            case Snapshot():
                self._put_all(message)
            case _:
                return False
        return True

    def _put_all(self, snapshot: Snapshot) -> None:
        # Who has an alias is a matter of order: theirs, not ours.
        self.models.clear()
        self.names.clear()
        for record in snapshot.models:
            self.put_model(record)
        for agent in snapshot.agents:
            self._put_agent(agent)
        for key in snapshot.api_keys:
            self.put_api_key(key)
        self.keep_only(
            models=self.models,
            agents=[agent.record.agent for agent in snapshot.agents],
            jobs=(),
            api_keys=[key.id for key in snapshot.api_keys],
        )
        self._know(snapshot.known)
        self._touch()

    def _put_agent(self, agent: AgentIs) -> None:
        self.mirror_agent(agent.record, agent.revision, agent.seen_s, failed=agent.failed)

    def _know(self, known: KeysKnown) -> None:
        if known.keys_asked:
            self.ask_for_keys()
        if known.listed:
            self.is_listed()
