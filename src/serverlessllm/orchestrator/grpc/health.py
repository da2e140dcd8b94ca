"""`grpc.health.v1.Health`. It needs no key: those who watch a process have none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from serverlessllm.core.errors import RouteNotFound, TooManyRequests
from serverlessllm.orchestrator.grpc.calls import Call, Serve, one

SERVICE = "grpc.health.v1.Health"

_SERVING = HealthCheckResponse.SERVING
_NOT_SERVING = HealthCheckResponse.NOT_SERVING
_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """Serves until `stop`; `services` are the names that may be asked about, beside the whole
    server's, which is empty."""

    def __init__(self, services: Iterable[str], watchers_max: int) -> None:
        self._names = ("", *services)
        self._watchers_max = watchers_max
        self._watchers = 0
        self._stopping = asyncio.Event()
        self.methods: dict[str, Serve] = {
            "Check": one(HealthCheckRequest, self._check),
            "Watch": self._watch,
        }

    def stop(self) -> None:
        """From now on, say that requests should go elsewhere."""
        self._stopping.set()

    async def _check(self, _: Call, request: HealthCheckRequest) -> HealthCheckResponse:
        status = self._status(request.service)
        if status == _UNKNOWN:
            raise RouteNotFound(f"there is no service {request.service[:200]!r}")
        return HealthCheckResponse(status=status)

    async def _watch(self, call: Call) -> None:
        request = await call.receive(HealthCheckRequest)
        if self._watchers >= self._watchers_max:
            raise TooManyRequests("too many watch this server's health", retry_after_s=10.0)
        self._watchers += 1
        try:
            if not self._stopping.is_set():
                await call.send(HealthCheckResponse(status=self._status(request.service)))
                await self._stopping.wait()
            await call.send(HealthCheckResponse(status=self._status(request.service)))
            await asyncio.Event().wait()  # nothing comes after that
        finally:
            self._watchers -= 1

    def _status(self, service: str) -> HealthCheckResponse.ServingStatus:
        if service not in self._names:
            return _UNKNOWN
        return _NOT_SERVING if self._stopping.is_set() else _SERVING
