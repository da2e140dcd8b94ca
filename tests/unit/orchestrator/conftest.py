"""Records to build views of, and a load that a test holds in its hands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.cluster import AgentRecord, CacheLevel, ModelOnAgent, TierUsage
from serverlessllm.core.ids import Address, AgentId, CheckpointId, Epoch, ModelId
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.core.models import CheckpointRef, ModelRecord, ModelSpec
from serverlessllm.orchestrator.coldstart import Fleet, Loaded
from serverlessllm.testing.clock import VirtualClock

TIER = TierUsage(budget_bytes=1 << 40, used_bytes=0)


class Make:
    """Makers of records."""

    @staticmethod
    def model(name: str, *, size_bytes: int = 100, **fields: object) -> ModelRecord:
        ref = CheckpointRef(
            id=CheckpointId("ab" * 32), prefix=f"{name}/main", size_bytes=size_bytes
        )
        spec = ModelSpec(model=ModelId(name), **fields)  # type: ignore[arg-type]
        return ModelRecord(spec=spec, checkpoint=ref)

    @staticmethod
    def on(
        name: str,
        *,
        ready: bool = True,
        level: CacheLevel | None = None,
        queue_len: int = 0,
        slots: int = 1,
        service_s: float | None = 1.0,
        start_s: float | None = 2.0,
    ) -> ModelOnAgent:
        return ModelOnAgent(
            model=ModelId(name),
            cache_level=level if level is not None else CacheLevel(0 if ready else 2),
            state=InstanceState.READY if ready else None,
            queue_len=queue_len,
            slots=slots,
            service_s=service_s,
            start_s=start_s,
        )

    @staticmethod
    def agent(
        name: str, *models: ModelOnAgent, epoch: int = 1, accepting: bool = True
    ) -> AgentRecord:
        return AgentRecord(
            agent=AgentId(name),
            epoch=Epoch(epoch),
            address=Address(f"unix:/run/{name}.sock"),
            accepting=accepting,
            dram=TIER,
            nvme=TIER,
            models=models,
        )


class HeldLoads:
    """`BringsUp`, whose loads end when the test says so."""

    def __init__(self) -> None:
        self.started: list[tuple[ModelId, bool]] = []
        self.cancelled = 0
        self.outcome: asyncio.Future[Loaded] = asyncio.get_running_loop().create_future()
        self.publish: Callable[[LoadEvent], None] = lambda _: None
        self.became_ready: Callable[[Loaded], None] = lambda _: None
        self.agents: Fleet = frozenset({(AgentId("a"), Epoch(1))})

    async def bring_up(
        self,
        model: ModelId,
        elsewhere: bool,
        publish: Callable[[LoadEvent], None],
        became_ready: Callable[[Loaded], None],
    ) -> Loaded:
        self.started.append((model, elsewhere))
        self.publish = publish
        self.became_ready = became_ready
        try:
            return await asyncio.shield(self.outcome)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def fleet(self) -> Fleet:
        return self.agents

    def end(self, outcome: Loaded | BaseException) -> None:
        """This load ends so; the next one is held again."""
        ending, self.outcome = self.outcome, self.outcome.get_loop().create_future()
        if isinstance(outcome, BaseException):
            ending.set_exception(outcome)
        else:
            ending.set_result(outcome)


@pytest.fixture
def make() -> Make:
    return Make()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
async def loads() -> HeldLoads:
    return HeldLoads()


@pytest.fixture
def settle() -> Callable[[], object]:
    """`await settle()`: everything that can run has run."""

    async def run() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    return run
