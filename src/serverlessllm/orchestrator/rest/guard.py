"""Who may ask: no page of another origin, no foreign name of this machine, no missing key.

A browser sends `Origin` with whatever a page may change; a page that rebinds its own name to
127.0.0.1 is told by its `Host`. Programs send no `Origin` and pass.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress

from serverlessllm.core.errors import Forbidden, Unauthorized
from serverlessllm.core.ids import Address, is_loopback
from serverlessllm.edge.server import Request
from serverlessllm.orchestrator.settings import OrchestratorSettings

OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""Answered without a key: those who watch a process have none."""
_KNOWN_HOSTS_MAX = 256


class Guard:
    """Checks each request before its route; `listen` is the address served on."""

    def __init__(self, settings: OrchestratorSettings, listen: Address) -> None:
        self._keys = tuple(digest.lower().encode() for digest in settings.api_key_sha256)
        self._names = frozenset(name.lower() for name in settings.allowed_hosts)
        # Only a loopback address is protected by nothing but being hard to reach.
        self._check_host = listen.startswith("http://") and is_local(listen)
        self._good_hosts: set[str] = set()

    def check(self, request: Request) -> None:
        """Return if the request may go on.

        Raises:
            Forbidden: a browser's cross-origin request, or a `Host` that is not ours.
            Unauthorized: keys are set, and this request has none of them.
        """
        headers = request.headers
        host = headers.get("host")
        if self._check_host and host is not None and host not in self._good_hosts:
            self._learn_host(host)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != (host or "").lower():
            raise Forbidden("requests from web pages of another origin are not served")
        if self._keys and request.path not in OPEN_PATHS:
            self._check_key(headers.get("authorization"))

    def _learn_host(self, host: str) -> None:
        name = _host_name(host)
        if not (_is_ip(name) or name == "localhost" or name in self._names):
            raise Forbidden(
                f"this server is not known as {name[:100]!r}: ask it by its IP address, or add "
                "the name to orchestrator.allowed_hosts"
            )
        if len(self._good_hosts) < _KNOWN_HOSTS_MAX:
            self._good_hosts.add(host)

    def _check_key(self, authorization: str | None) -> None:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("no API key: send it as `Authorization: Bearer KEY`")
        digest = hashlib.sha256(key.strip().encode()).hexdigest().encode()
        if not any(hmac.compare_digest(digest, known) for known in self._keys):
            raise Unauthorized("the API key is not one of this server's")


def _host_name(host: str) -> str:
    """`Host` without its port, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_local(listen: Address) -> bool:
    """Whether only this machine reaches the address."""
    if not listen.startswith("http://"):
        return listen.startswith("unix:")
    return is_loopback(_host_name(listen.removeprefix("http://").rstrip("/")).strip("[]"))
