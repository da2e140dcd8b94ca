"""One agent: composed, started, drained and closed."""

from __future__ import annotations

from pathlib import Path

from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.registry import Backends
from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import Address, AgentId


class Agent:
    """The daemon of a node: brings checkpoints near, runs backends, relays requests to them.

    `registry` is a `serverlessllm.metadata.registry.Registry`, `loader` a
    `serverlessllm.loader.service.Loader` (started and closed by the agent); `token` the
    cluster's; `run_dir` a private directory with a short path for unix sockets (a directory of
    the agent's own is made in it); `log_dir` takes the backends' output.
    """

    def __init__(
        self,
        settings: AgentSettings,
        *,
        agent: AgentId,
        registry: object,
        loader: object,
        backends: Backends,
        clock: Clock,
        token: str,
        run_dir: Path,
        log_dir: Path,
    ) -> None:
        self._settings = settings

    async def start(self, listen: Address | None = None) -> Address:
        """Kill what an earlier agent left running, register, and serve; the address in fact."""
        return listen or Address("")

    async def drain(self) -> None:
        """What SIGTERM asks: not ready, take requests a while longer, finish the running ones."""

    async def close(self) -> None:
        """Stop every instance and task; the lease is given back last. Idempotent."""
