"""Who may ask: names, origins, keys, scopes, models."""

from __future__ import annotations

import hashlib
from typing import cast

import pytest

from serverlessllm.core.apikeys import ApiKey, Scope, digest_of
from serverlessllm.core.errors import Forbidden, MetadataUnavailable, Unauthorized
from serverlessllm.core.ids import Address, KeyId, ModelId
from serverlessllm.edge.request import Line, Request, RequestHeaders
from serverlessllm.orchestrator.rest.guard import (
    ANY,
    Guard,
    InsufficientScope,
    ModelNotAllowed,
    caller_of,
)
from serverlessllm.orchestrator.rest.quota import Quotas
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.testing.clock import VirtualClock

LOOPBACK = Address("http://127.0.0.1:8000")


def asking(**headers):
    """A request that nobody answers."""
    fields = {
        name.replace("_", "-").encode(): value.encode()
        for name, value in headers.items()
        if value is not None
    }
    return Request(cast("Line", None), "POST", "/v1/models", "", RequestHeaders(fields), 0.0, True)


class Door:
    """A guard and what it looks at."""

    def __init__(self, listen=LOOPBACK, *, listed=True, **settings):
        self.view = ClusterView()
        self.view.listed = listed
        self.now_s = 1000.0
        self.quotas = Quotas(VirtualClock())
        self.guard = Guard(
            OrchestratorSettings(**settings),
            listen,
            view=self.view,
            quotas=self.quotas,
            wall_s=lambda: self.now_s,
        )

    def check(self, request, scope=Scope.INFERENCE):
        self.guard.check(request, scope)
        return caller_of(request)

    def add(self, text, **fields):
        key = ApiKey(id=KeyId(f"key_{text}"), name=text, sha256=digest_of(text.encode()), **fields)
        self.view.put_api_key(key)
        return key


def bearer(key):
    return asking(authorization=f"Bearer {key}")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "127.0.0.1",
        "localhost:8000",
        "[::1]:8000",
        "10.0.0.5:80",
        None,
        "my.host:1",
    ],
)
def test_our_own_names_pass(host):
    headers = {} if host is None else {"host": host}
    door = Door(allowed_hosts=("my.host",))
    door.check(asking(**headers))
    door.check(asking(**headers))


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "", "a" * 999])
def test_foreign_names_of_a_loopback_server_do_not(host):
    with pytest.raises(Forbidden):
        Door().check(asking(host=host))


@pytest.mark.parametrize("listen", ["http://0.0.0.0:80", "unix:/run/x.sock"])
def test_a_server_for_others_is_known_by_any_name(listen):
    Door(listen, allow_public_without_key=True).check(asking(host="api.example.com"))


@pytest.mark.parametrize(
    ("listen", "settings"),
    [
        ("http://0.0.0.0:80", {}),
        ("http://0.0.0.0:80", {"require_key": True}),
        (LOOPBACK, {"grpc_listen": "http://0.0.0.0:81"}),
    ],
)
def test_a_server_for_others_asks_for_a_key_though_there_is_none(listen, settings):
    with pytest.raises(Unauthorized):
        Door(listen, **settings).check(asking())


@pytest.mark.parametrize("origin", ["null", "http://evil.example", "http://127.0.0.1:3000"])
def test_a_page_of_another_origin_is_refused_everywhere(origin):
    for listen in (LOOPBACK, "http://0.0.0.0:80"):
        with pytest.raises(Forbidden):
            Door(listen).check(asking(host="127.0.0.1:8000", origin=origin))


def test_our_own_page_passes():
    for scheme in ("http", "https"):
        Door().check(asking(host="127.0.0.1:8000", origin=f"{scheme}://127.0.0.1:8000"))


def test_keys_of_the_configuration_open_everything():
    digests = tuple(hashlib.sha256(key).hexdigest() for key in (b"one", b"two"))
    door = Door(api_key_sha256=digests, listed=False)
    for value in ("Bearer one", "bearer two", "Bearer  two "):
        for scope in Scope:
            assert door.check(asking(authorization=value), scope) is not None
    bad = ("", "one", "Bearer", "Basic one", "Bearer ", f"Bearer {digests[0]}")
    for value in bad:
        with pytest.raises((Unauthorized, MetadataUnavailable)):
            door.check(asking(authorization=value))
    assert door.check(asking(x_api_key="one")) is not None
    door.check(asking(), None)


def test_no_key_is_asked_for_until_there_is_one():
    door = Door()
    assert door.check(asking()) is None
    key = door.add("one")
    with pytest.raises(Unauthorized, match="no API key"):
        door.check(asking())
    with pytest.raises(Unauthorized, match="not one of"):
        door.check(bearer("two"))
    assert door.check(bearer("one")).id == key.id
    door.view.drop_api_key(key.id)
    with pytest.raises(Unauthorized):  # once there were keys, the door stays shut
        door.check(asking())
    with pytest.raises(Unauthorized):
        door.check(bearer("one"))


def test_while_nobody_knows_of_keys_nobody_gets_in():
    for settings in ({}, {"require_key": True}):
        door = Door(listed=False, **settings)
        for scope in (*Scope, ANY):
            with pytest.raises(MetadataUnavailable):
                door.check(bearer("one"), scope)
        door.check(asking(), None)
    assert Door(listed=False, require_key=False).check(asking()) is None


def test_a_required_key_is_required_though_there_is_none():
    door = Door(require_key=True)
    for request in (asking(), bearer("one")):
        with pytest.raises(Unauthorized):
            door.check(request)


def test_a_key_that_is_revoked_or_has_expired_says_so():
    door = Door()
    key = door.add("one", expires_s=1010)
    door.check(bearer("one"))
    door.now_s = 1010.0
    with pytest.raises(Unauthorized, match="expired"):
        door.check(bearer("one"))
    door.now_s = 1000.0
    door.check(bearer("one"))
    door.view.put_api_key(ApiKey(id=key.id, name="one", sha256=key.sha256, revoked_s=1))
    with pytest.raises(Unauthorized, match="revoked"):
        door.check(bearer("one"))


def test_a_scope_opens_its_routes_only():
    door = Door()
    opens = {
        "infer": {Scope.INFERENCE},
        "admin": {Scope.ADMIN, Scope.METRICS},
        "metrics": {Scope.METRICS},
    }
    door.add("infer")
    door.add("admin", scopes=(Scope.ADMIN,))
    door.add("metrics", scopes=(Scope.METRICS,))
    for text, scopes in opens.items():
        door.check(bearer(text), ANY)
        for scope in Scope:
            if scope in scopes:
                door.check(bearer(text), scope)
            else:
                with pytest.raises(InsufficientScope, match=str(scope)):
                    door.check(bearer(text), scope)


def test_a_key_uses_the_models_of_its_list_and_patterns():
    door = Door()
    door.add("one", models=("small", "short", "org/*"))
    caller = door.check(bearer("one"))
    names = {n: ModelId(n) for n in ("small", "big", "org/a", "organ/b")} | {
        "short": ModelId("org2/long")
    }
    usable = set(caller.usable(names).values())
    assert usable == {"small", "org/a", "org2/long"}
    for model in ("big", "organ/b", "smal", "small2", "xorg/a"):
        with pytest.raises(ModelNotAllowed) as refused:
            caller.check_model(model, names)
        assert (refused.value.status, refused.value.code) == (403, "model_not_allowed")
    door.add("two")
    assert door.check(bearer("two")).usable(names) is names


def test_usage_outlives_other_keys_changes():
    door = Door()
    door.add("one", requests_per_minute=5)
    usage = door.check(bearer("one")).usage
    assert usage is not None
    door.add("two")
    assert door.check(bearer("one")).usage is usage


def test_variants_of_one_key_do_not_fill_the_memory():
    door = Door()
    door.add("one")
    for spaces in range(1, 300):
        door.check(asking(authorization="Bearer" + " " * spaces + "one"))
    assert len(door.guard._callers) <= 256
