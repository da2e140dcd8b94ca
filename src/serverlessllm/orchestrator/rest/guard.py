"""Who may ask: no page of another origin, no foreign name of this machine, no missing key.

A browser sends `Origin` with whatever a page may change; a page that rebinds its own name to
127.0.0.1 is told by its `Host`. Programs send no `Origin` and pass. Keys are told apart by their
SHA-256, compared in constant time.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from serverlessllm.core.apikeys import ApiKey, Scope, digest_of
from serverlessllm.core.errors import Forbidden, MetadataUnavailable, SLLMError, Unauthorized
from serverlessllm.core.ids import Address, ModelId, is_loopback
from serverlessllm.edge.server import Request
from serverlessllm.orchestrator.rest.quota import Quotas
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView

ANY: Final = "any"
"""Of what every key may see: that there is no such route."""
_BASIC: Final = "basic "
_KNOWN_HOSTS_MAX: Final = 256
_ID_DIGITS: Final = 12
_KNOWN_KEYS_MAX: Final = 4096
_USED_MAX: Final = 1024
_KNOWN_KEY_CHARS_MAX: Final = 256


class Given(Protocol):
    """Header fields, or what a gRPC client calls its metadata."""

    def get(self, name: str, /) -> str | None:
        """The field of that (lower-case) name."""
        ...


class PasswordWanted(Unauthorized):
    """A browser, told so, asks its user: any name, and the API key as the password."""


class InsufficientScope(Forbidden):
    """The API key is good, but not for this route."""

    code = "insufficient_scope"


class ModelNotAllowed(Forbidden):
    """The API key is good, but not for this model."""

    code = "model_not_allowed"


class Caller:
    """Whoever has a key: what it opens, and what it has left of its limits."""

    __slots__ = ("_names", "_patterns", "_used", "expires_s", "id", "restricted", "scopes", "usage")

    def __init__(self, name: str, key: ApiKey | None, quotas: Quotas) -> None:
        """`key` is None for one of the configuration's, which open everything."""
        self.id = name
        # Few, and found by identity: to hash a member of an enum costs more.
        self.scopes = tuple(Scope if key is None else key.scopes)
        if Scope.ADMIN in self.scopes and Scope.METRICS not in self.scopes:
            self.scopes += (Scope.METRICS,)
        self.expires_s = None if key is None else key.expires_s
        self.usage = None if key is None else quotas.of(key)
        models = () if key is None else key.models
        self._names = frozenset(name for name in models if "*" not in name)
        self._patterns = tuple(_pattern(name) for name in models if "*" in name)
        self._used: set[str] = set()
        """Names that a pattern was found to allow."""
        self.restricted = bool(models)
        """Whether there are models that it may not use."""

    def may_use(self, model: str, names: Mapping[str, ModelId]) -> bool:
        """Whether the model of this canonical name is for it; `names` are all names there are."""
        if not self.restricted or model in self._used or model in self._names:
            return True
        if any(pattern.fullmatch(model) for pattern in self._patterns):
            if len(self._used) < _USED_MAX:
                self._used.add(model)
            return True
        return any(names.get(name) == model for name in self._names)

    def check_model(self, model: str, names: Mapping[str, ModelId]) -> None:
        """Raise `ModelNotAllowed` unless it may use the model (as `may_use`)."""
        if not self.may_use(model, names):
            raise ModelNotAllowed(
                f"this API key may not use the model {model[:200]!r}", param="model"
            )

    def usable(self, names: dict[str, ModelId]) -> dict[str, ModelId]:
        """Of `names`, those of the models that it may use."""
        if not self.restricted:
            return names
        return {name: model for name, model in names.items() if self.may_use(model, names)}


class Guard:
    """Checks each request before its route; `listen` is the address served on.

    `wall_s` is Unix time, by which a key expires.
    """

    def __init__(
        self,
        settings: OrchestratorSettings,
        listen: Address,
        *,
        view: ClusterView,
        quotas: Quotas,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._fixed = tuple(digest.lower() for digest in settings.api_key_sha256)
        self._required = settings.require_key
        """None: as soon as there is a key."""
        undecided = settings.require_key is None and not settings.allow_public_without_key
        reached = not (is_local(listen) and is_local(settings.grpc_listen or listen))
        if self._fixed or (undecided and reached):
            self._required = True
        self._names = frozenset(name.lower() for name in settings.allowed_hosts)
        # Only a loopback address is protected by nothing but being hard to reach.
        self._check_host = listen.startswith("http://") and is_local(listen)
        self._view = view
        self._quotas = quotas
        self._wall_s = wall_s
        self._good_hosts: set[str] = set()
        self._callers: dict[str, Caller] = {}
        """By the header that proved it, for as long as no key changes."""
        self._callers_of = view.keys_version

    def check(self, request: Request, scope: str | None, *, page: bool = False) -> None:
        """Return if the request may go on; its `caller` is then who asks, if keys are asked for.

        `scope` is what its route takes (`ANY`: any key); None: no key. A `page` is for a browser,
        which sends a key as a password.

        Raises:
            Forbidden: a browser's cross-origin request, a `Host` that is not ours, or a key that
                opens other routes.
            Unauthorized: a key is asked for, and this request has none that is good.
            MetadataUnavailable: whether it is good is not known.
        """
        headers = request.headers
        host = headers.get("host")
        if self._check_host and host is not None and host not in self._good_hosts:
            self._learn_host(host)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != (host or "").lower():
            raise Forbidden("requests from web pages of another origin are not served")
        if scope is None or not self._asks():
            return
        try:
            caller = self._caller(request.headers, page)
        except Unauthorized as error:
            if not page:
                raise
            raise PasswordWanted(error.message) from error
        if scope is not ANY and scope not in caller.scopes:
            raise InsufficientScope(f"this API key lacks the scope {scope}")
        request.caller = caller

    def refuses(self, request: Request) -> bool:
        """Whether no body is taken from whoever sends this head, wherever it goes."""
        try:
            self.check(request, ANY)
        except SLLMError:
            return True
        request.caller = None
        return False

    def check_key(self, given: Given) -> None:
        """Return if whoever sent this may ask for something, whatever it is.

        Raises:
            Unauthorized: a key is asked for, and there is none that is good.
            MetadataUnavailable: whether it is good is not known.
        """
        if self._asks():
            self._caller(given, page=False)

    def _asks(self) -> bool:
        """Whether a key is asked for.

        Raises:
            MetadataUnavailable: nobody knows: the keys have never been read.
        """
        if self._required is not None:
            return self._required
        if self._view.keys_asked:
            return True
        if self._view.listed:
            return False
        raise _not_known()

    def _caller(self, headers: Given, page: bool) -> Caller:
        if self._callers_of != self._view.keys_version:
            self._forget_callers()
        given = headers.get("authorization")
        if given is None:
            given = f"bearer {headers.get('x-api-key') or ''}"
        elif page and given[: len(_BASIC)].lower() == _BASIC:
            given = f"bearer {_password(given[len(_BASIC) :])}"
        caller = self._callers.get(given)
        if caller is None:
            caller = self._prove(given)
            if len(given) <= _KNOWN_KEY_CHARS_MAX:
                if len(self._callers) >= _KNOWN_KEYS_MAX:
                    self._callers.clear()
                self._callers[given] = caller
        if caller.expires_s is not None and self._wall_s() >= caller.expires_s:
            raise Unauthorized(f"the API key {caller.id} has expired")
        return caller

    def _prove(self, given: str) -> Caller:
        scheme, _, text = given.partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise Unauthorized("no API key: send it as `Authorization: Bearer KEY`")
        digest = digest_of(text.strip().encode("latin-1"))
        # All of them, whichever it is.
        if sum(hmac.compare_digest(digest, known) for known in self._fixed):
            return Caller(f"key_of_settings_{digest[:_ID_DIGITS]}", None, self._quotas)
        key = self._view.api_keys.get(digest)
        if key is None or not hmac.compare_digest(digest, key.sha256):
            if not self._view.listed:
                raise _not_known()
            raise Unauthorized("the API key is not one of this server's")
        if key.revoked_s is not None:
            raise Unauthorized(f"the API key {key.id} was revoked")
        return Caller(key.id, key, self._quotas)

    def _forget_callers(self) -> None:
        self._callers.clear()
        self._callers_of = self._view.keys_version
        self._quotas.keep_only({key.id: key for key in self._view.api_keys.values()})

    def _learn_host(self, host: str) -> None:
        name = _host_name(host)
        if not (_is_ip(name) or name == "localhost" or name in self._names):
            raise Forbidden(
                f"this server is not known as {name[:100]!r}: ask it by its IP address, or add "
                "the name to orchestrator.allowed_hosts"
            )
        if len(self._good_hosts) < _KNOWN_HOSTS_MAX:
            self._good_hosts.add(host)


def caller_of(request: Request) -> Caller | None:
    """Who asks; None while no keys are asked for."""
    caller = request.caller
    return caller if isinstance(caller, Caller) else None


def _password(credentials: str) -> str:
    """The password in what HTTP's basic scheme sends; empty where there is none."""
    try:
        return base64.b64decode(credentials, validate=True).decode("latin-1").partition(":")[2]
    except ValueError:
        return ""


def _not_known() -> MetadataUnavailable:
    return MetadataUnavailable("the API keys cannot be read yet; try again", retry_after_s=1.0)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in text.split("*")))


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
