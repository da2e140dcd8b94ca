"""What workers say of the cluster, done in the main process."""

from __future__ import annotations

from serverlessllm.core.ids import ModelId
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.rest.quota import Quotas
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.workers.messages import (
    AgentFailed,
    FromWorker,
    KeysSpent,
    ModelLost,
    NotReady,
    Unwished,
    Wish,
)
from serverlessllm.orchestrator.workers.process import WorkerProcess
from serverlessllm.orchestrator.workers.sharing import note_spent
from serverlessllm.orchestrator.workers.wishes import Wishes


class Hearing:
    """Acts on the view, the waiting room and the limits as a request of this process would."""

    def __init__(self, view: ClusterView, room: WaitingRoom, quotas: Quotas) -> None:
        self._view = view
        self._room = room
        self._quotas = quotas
        self._wishes = Wishes(view, room)

    def hear(self, worker: WorkerProcess, message: FromWorker) -> None:
        match message:
            case AgentFailed(agent=agent):
                self._view.failed(agent)
            case ModelLost(agent=agent, model=model):
                self._view.lost(agent, model)
            case NotReady(agent=agent, model=model):
                self._room.not_ready(model, agent)
            case Wish():
                self._wishes.begin(worker, message)
            case Unwished():
                self._wishes.end(worker, message)
            case KeysSpent():
                note_spent(self._quotas, self._view, message)
            case _:
                raise AssertionError(f"a worker said {type(message).__name__}")

    def forget(self, worker: WorkerProcess) -> None:
        """It has ended: nobody there wants anything any more."""
        self._wishes.end_all(worker)

    def waiting_for(self) -> dict[ModelId, int]:
        """Requests in this process's waiting room; those of workers are counted there."""
        return {
            model: own
            for model, waiting in self._room.waiting_for().items()
            if (own := waiting - self._wishes.waiting_for(model)) > 0
        }

    async def close(self) -> None:
        """End what is being done for workers."""
        await self._wishes.close()
