"""One orchestrator: the view, the router, the waiting room and the routes, started and ended."""

from __future__ import annotations

from pathlib import Path

from serverlessllm.core.clock import Clock
from serverlessllm.core.ids import Address
from serverlessllm.orchestrator.seams import DeletesCheckpoints, Ingests
from serverlessllm.orchestrator.settings import OrchestratorSettings


class Orchestrator:
    """Stateless: any number of them serve the same cluster.

    `registry` is a `serverlessllm.metadata.registry.Registry`; `token` the cluster's, sent to
    agents; `run_dir` a private directory with a short path, for unix sockets.
    """

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        registry: object,
        ingestion: Ingests,
        store: DeletesCheckpoints,
        clock: Clock,
        token: str,
        run_dir: Path,
    ) -> None:
        self._settings = settings

    async def start(self, listen: Address | None = None) -> Address:
        """Serve on `listen` (the setting's by default); the address in fact, port 0 resolved.

        Raises:
            ValueError: not loopback, and no API key is set.
        """
        return listen or self._settings.listen

    async def drain(self) -> None:
        """What SIGTERM asks: not ready, take requests a while longer, finish the running ones."""

    async def close(self) -> None:
        """Stop at once; also ends what `drain` left."""
