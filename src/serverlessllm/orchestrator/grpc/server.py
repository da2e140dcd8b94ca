"""The gRPC listener: started, drained and closed with the HTTP one, which answers its requests."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import Draining
from serverlessllm.core.ids import Address
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.edge.wire import join_address, split_address
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.grpc import health, openai, repository
from serverlessllm.orchestrator.grpc.asking import Asking
from serverlessllm.orchestrator.grpc.calls import Call, Calls, Serve
from serverlessllm.orchestrator.grpc.proto.pool import POOL
from serverlessllm.orchestrator.grpc.statistics import Statistics
from serverlessllm.orchestrator.grpc.triton import Triton
from serverlessllm.orchestrator.grpc.watching import Watching
from serverlessllm.orchestrator.rest.front import Front
from serverlessllm.orchestrator.rest.guard import Given
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView

_REFLECTION = ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1.ServerReflection")
"""The same messages by two names: older clients know the first, newer ones the second."""
_SERVICES = (openai.SERVICE, repository.SERVICE, health.SERVICE, _REFLECTION[0])


class GrpcServer:
    """Serves `settings.grpc_listen`; `not_ready` says why no request should be sent here."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        limits: RequestLimits,
        front: Front,
        view: ClusterView,
        room: WaitingRoom,
        edge: EdgeSettings,
        not_ready: Callable[[], str],
        check_key: Callable[[Given], None],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._edge = edge
        self._clock = clock
        self._stopping = False
        self._closing = asyncio.Event()
        """Whether calls without an end of their own have to end."""
        self._calls = Calls(edge, clock, calls_max=settings.grpc_calls_max, check_key=check_key)
        self._fresh: grpc.ServerCertificateConfiguration | None = None
        self._server: grpc.aio.Server | None = None
        self._asking = Asking(front, settings, lambda: self._stopping)
        self._health = health.Health(_SERVICES, settings.grpc_health_watchers_max)
        watching = Watching(settings, view=view, room=room, clock=clock)
        statistics = Statistics(view, clock)
        own = openai.OpenAI(self._asking, watching, room.listeners)
        triton = Triton(
            self._asking, settings, limits=limits, statistics=statistics, closing=self._closing
        )
        models = repository.Repository(
            self._asking, view=view, watching=watching, statistics=statistics, not_ready=not_ready
        )
        self._services: dict[str, Mapping[str, Serve]] = {
            openai.SERVICE: {**own.methods, "WatchModel": self._ending(own.methods["WatchModel"])},
            repository.SERVICE: models.methods | triton.methods,
            health.SERVICE: {
                **self._health.methods,
                "Watch": self._ending(self._health.methods["Watch"]),
            },
        }
        for name in _REFLECTION:
            self._services[name] = {"ServerReflectionInfo": self._ending(_reflect)}

    async def start(self, listen: Address) -> Address:
        """Serve; the address in fact, port 0 resolved.

        Raises:
            OSError: the address cannot be had.
            ValueError: it is none, or the certificate cannot be used.
        """
        where = split_address(listen)
        if not isinstance(where, str):
            _try_to_bind(*where)
        self._server = server = grpc.aio.server(
            options=_options(self._settings),
            maximum_concurrent_rpcs=self._settings.grpc_calls_max
            + self._settings.grpc_unread_calls_max,
        )
        for name, methods in self._services.items():
            handlers = {
                # Those who watch a process have no key.
                method: self._calls.handler(
                    f"/{name}/{method}", serve, public=name == health.SERVICE
                )
                for method, serve in methods.items()
            }
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        target = f"unix:{where}" if isinstance(where, str) else f"{_bracketed(where[0])}:{where[1]}"
        try:
            if self._settings.tls_certificate is None:
                port = server.add_insecure_port(target)
            else:
                port = server.add_secure_port(target, self._credentials())
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {listen}") from error
        await server.start()
        self._calls.start()
        return listen if isinstance(where, str) else join_address(where[0], port)

    async def drain(self, grace_s: float) -> None:
        """Tell those who watch, take calls for `drain_accept_s` more, and let those that run
        finish for `grace_s`; they are then cancelled."""
        self._stopping = True
        self._health.stop()
        await self._clock.sleep(self._edge.drain_accept_s)
        self._closing.set()
        if self._server is not None:
            await self._server.stop(grace_s)
        await self.close()

    async def close(self) -> None:
        """Cancel every call, and stop. Idempotent."""
        self._stopping = True
        self._health.stop()
        self._closing.set()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
        await self._calls.close()

    def reload_certificate(self) -> None:
        """Have new connections see what the certificate's files hold now.

        Raises:
            ValueError: they cannot be read; everything is as it was.
        """
        self._fresh = _certificate(self._settings)

    def _credentials(self) -> grpc.ServerCredentials:
        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """What a new connection shows, if it is not what the last one did."""
            fresh, self._fresh = self._fresh, None
            return fresh

        return grpc.dynamic_ssl_server_credentials(
            _certificate(self._settings),
            fetch,  # type: ignore[arg-type] # the stub forgets None, which keeps the last one
        )

    def _ending(self, serve: Serve) -> Serve:
        """A method whose calls last as long as their client likes: they end with the listener."""

        async def serve_until_closing(call: Call) -> None:
            serving = asyncio.ensure_future(serve(call))
            closed = asyncio.ensure_future(self._closing.wait())
            try:
                await asyncio.wait((serving, closed), return_when=asyncio.FIRST_COMPLETED)
                if not serving.done():
                    raise Draining("this server is shutting down; ask again")
                serving.result()
            finally:
                for task in (serving, closed):
                    task.cancel()
                await asyncio.gather(serving, closed, return_exceptions=True)

        return serve_until_closing


async def _reflect(call: Call) -> None:
    servicer = reflection.aio.ReflectionServicer(_SERVICES, pool=POOL)
    requests = call.requests(reflection_pb2.ServerReflectionRequest)
    async for response in servicer.ServerReflectionInfo(requests, None):
        await call.send(response)


def _options(settings: OrchestratorSettings) -> list[tuple[str, int]]:
    return [
        # Two servers on one port would take each other's calls.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", settings.grpc_connections_max),
        ("grpc.max_concurrent_streams", settings.grpc_calls_per_connection_max),
        ("grpc.max_receive_message_length", settings.grpc_message_bytes_max),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", settings.grpc_metadata_bytes_max),
        ("grpc.absolute_max_metadata_size", settings.grpc_metadata_bytes_max),
        ("grpc.server_handshake_timeout_ms", _ms(settings.grpc_handshake_s_max)),
        ("grpc.max_connection_idle_ms", _ms(settings.grpc_idle_s_max)),
        ("grpc.keepalive_time_ms", _ms(settings.grpc_keepalive_s)),
        ("grpc.keepalive_timeout_ms", _ms(settings.grpc_keepalive_s_max)),
        ("grpc.keepalive_permit_without_calls", 1),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            _ms(settings.grpc_ping_interval_s_min),
        ),
    ]


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _try_to_bind(host: str, port: int) -> None:
    """Raise the `OSError` that gRPC would keep to itself."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        socket.create_server((str(address[0]), int(address[1])), family=family).close()
    except OSError as error:
        raise OSError(error.errno, f"gRPC on {host}:{port}: {error.strerror}") from error


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _certificate(settings: OrchestratorSettings) -> grpc.ServerCertificateConfiguration:
    assert settings.tls_certificate is not None
    assert settings.tls_key is not None
    try:
        chain = Path(settings.tls_certificate).read_bytes()
        key = Path(settings.tls_key).read_bytes()
    except OSError as error:
        raise ValueError(f"TLS: {error.filename} cannot be read: {error.strerror}") from error
    return grpc.ssl_server_certificate_configuration([(key, chain)])
