"""Where the servers listen, and which addresses they may."""

from __future__ import annotations

from serverlessllm.config.load import Loaded
from serverlessllm.core.ids import Address, is_loopback

_PORT_MAX = 65535


_OPEN_FRONT = (
    "no API key is asked for. Listen on 127.0.0.1, make a key (`sllm key create`), or accept that "
    "everybody there may use and change everything: --allow-remote"
)
_OPEN_AGENT = (
    "agents speak plain HTTP, where the cluster token can be read on its way. Leave it out for a "
    "unix socket, listen on 127.0.0.1, or accept that on a network of your own: --allow-remote"
)


def parse_listen(
    text: str,
    *,
    allow_remote: bool = False,
    name: str = "listen address",
    remote_refused: str = _OPEN_FRONT,
) -> Address:
    """`host:port`, `[::1]:port`, `http://host:port` or `unix:/path` → an address to listen on.

    `name` is who says so; `remote_refused` why other machines may not reach it, and the way out.

    Raises:
        ValueError: not an address; or other machines reach it and `allow_remote` is off.
    """
    if text.startswith("unix:/"):
        return Address(text)
    host, separator, port = (
        text.removeprefix("http://").removeprefix("https://").rstrip("/").rpartition(":")
    )
    bare = host.removeprefix("[").removesuffix("]")
    if not separator or not bare or not port.isdecimal() or int(port) > _PORT_MAX:
        raise ValueError(f"{name} {text!r}: write host:port, such as 127.0.0.1:8000, or unix:/path")
    if not is_loopback(bare) and not allow_remote:
        raise ValueError(f"{name} {text!r}: other machines could reach it, and {remote_refused}")
    return Address(f"http://{f'[{bare}]' if ':' in bare else bare}:{int(port)}")


def client_address(loaded: Loaded) -> Address:
    """Where clients are served.

    Raises:
        ValueError: as `parse_listen` does; other machines reach it and nobody asks for a key.
    """
    return _front(loaded, loaded.settings.orchestrator.listen, "orchestrator.listen")


def grpc_address(loaded: Loaded) -> Address | None:
    """Where gRPC clients are served, refused as `client_address` is; None: nowhere."""
    listen = loaded.settings.orchestrator.grpc_listen
    return None if listen is None else _front(loaded, listen, "orchestrator.grpc_listen")


def agent_address(loaded: Loaded) -> Address | None:
    """Where orchestrators reach this agent; None: by a unix socket in the runtime directory.

    Raises:
        ValueError: as `parse_listen` does.
    """
    settings = loaded.settings
    if settings.agent.listen is None:
        return None
    return parse_listen(
        settings.agent.listen,
        allow_remote=settings.orchestrator.allow_public_without_key,
        name="agent.listen",
        remote_refused=_OPEN_AGENT,
    )


def _front(loaded: Loaded, listen: str, name: str) -> Address:
    settings = loaded.settings.orchestrator
    asks = settings.require_key
    if asks is None:
        # Whether there is a key in the metadata store, the orchestrator will see.
        asks = bool(settings.api_key_sha256 or loaded.has_metadata)
    allow_remote = asks or settings.allow_public_without_key
    return parse_listen(listen, allow_remote=allow_remote, name=name)
