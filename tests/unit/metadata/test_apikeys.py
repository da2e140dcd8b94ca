"""API keys in the registry."""

from __future__ import annotations

import msgspec
import pytest

from serverlessllm.core.apikeys import KEY_PREFIX, ApiKey, NewApiKey, Scope, digest_of
from serverlessllm.core.errors import Conflict, InvalidRequest, MetadataUnavailable, RouteNotFound
from serverlessllm.core.ids import KeyId
from serverlessllm.metadata.registry import ApiKeyChanged, ApiKeyGone, Registry
from serverlessllm.metadata.settings import MetadataSettings


async def test_a_key_is_stored_as_a_hash_only(registry, store):
    key, text = await registry.create_api_key(NewApiKey(name="alice"))
    assert text.startswith(KEY_PREFIX)
    assert len(text) >= len(KEY_PREFIX) + 43  # 256 bits
    assert key.sha256 == digest_of(text.encode())
    (entry,) = (await store.list("")).entries
    assert text.encode() not in entry.value
    assert text[len(KEY_PREFIX) :].encode() not in entry.value
    _, other = await registry.create_api_key(NewApiKey(name="bob"))
    assert other != text


async def test_keys_are_listed_and_revoked_by_name_or_id(registry):
    alice, _ = await registry.create_api_key(NewApiKey(name="alice", scopes=(Scope.ADMIN,)))
    bob, _ = await registry.create_api_key(NewApiKey(name="bob", models=("org/*",)))
    assert {key.id for key in await registry.list_api_keys()} == {alice.id, bob.id}
    revoked = await registry.revoke_api_key("alice")
    assert revoked.id == alice.id
    assert revoked.revoked_s is not None
    assert await registry.revoke_api_key(alice.id) == revoked
    assert (await registry.revoke_api_key(bob.id)).revoked_s is not None
    for gone in ("alice", "nobody", ""):
        with pytest.raises(RouteNotFound):
            await registry.revoke_api_key(gone)
    assert len(await registry.list_api_keys()) == 2


async def test_a_name_is_taken_until_its_key_is_revoked(registry):
    first, _ = await registry.create_api_key(NewApiKey(name="alice"))
    with pytest.raises(Conflict):
        await registry.create_api_key(NewApiKey(name="alice"))
    await registry.revoke_api_key("alice")
    second, _ = await registry.create_api_key(NewApiKey(name="alice"))
    assert (await registry.revoke_api_key("alice")).id == second.id != first.id


async def test_two_keys_of_one_name_are_told_apart_by_id(registry, store):
    one, _ = await registry.create_api_key(NewApiKey(name="alice"))
    # Made at the same moment by another process.
    twin = msgspec.structs.replace(one, id="key_twin", sha256="1" * 64)
    await store.put("apikeys/key_twin", msgspec.json.encode(twin))
    with pytest.raises(Conflict, match="key_twin"):
        await registry.revoke_api_key("alice")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a" * 65),
        ("name", "a/b"),
        ("name", "a\nb"),
        ("name", " a"),
        ("scopes", ()),
        ("models", ("a b",)),
        ("models", ("",)),
        ("models", ("*a*b*c*d",)),
        ("models", ("m",) * 257),
        ("expires_s", 1),
        ("requests_per_minute", 0),
        ("tokens_per_minute", -1),
        ("requests_at_once", 10**13),
    ],
)
async def test_what_a_key_may_not_be(registry, field, value):
    with pytest.raises(InvalidRequest) as refused:
        await registry.create_api_key(NewApiKey(**{"name": "alice", field: value}))
    assert refused.value.param == field
    assert await registry.list_api_keys() == ()


async def test_the_number_of_keys_is_bounded_and_a_tombstone_stays(store):
    registry = Registry(store, MetadataSettings(api_keys_max=2, revoked_keys_kept_max=1))
    for name in ("a", "b"):
        await registry.create_api_key(NewApiKey(name=name))
    with pytest.raises(Conflict):
        await registry.create_api_key(NewApiKey(name="c"))
    await registry.revoke_api_key("a")
    await registry.revoke_api_key("b")
    (left,) = await registry.list_api_keys()
    assert (left.name, left.revoked_s is not None) == ("b", True)


async def test_a_watch_tells_of_keys(registry):
    snapshot = await registry.snapshot()
    key, _ = await registry.create_api_key(NewApiKey(name="alice"))
    changes = registry.watch(snapshot.revision)
    made = await anext(changes)
    assert isinstance(made, ApiKeyChanged)
    assert made.api_key == key
    revoked = await registry.revoke_api_key(key.id)
    ended = await anext(changes)
    assert isinstance(ended, ApiKeyChanged)
    assert ended.api_key == revoked
    await registry._metadata.delete(f"apikeys/{key.id}")
    assert isinstance(await anext(changes), ApiKeyGone)
    await changes.aclose()
    assert (await registry.snapshot()).api_keys == ()


async def test_revoking_keeps_what_a_newer_version_wrote(registry, store):
    key, _ = await registry.create_api_key(NewApiKey(name="alice"))
    where = f"apikeys/{key.id}"
    record = msgspec.json.decode((await store.get(where)).value)
    await store.put(where, msgspec.json.encode({**record, "colour": "blue"}))
    await registry.revoke_api_key("alice")
    assert msgspec.json.decode((await store.get(where)).value)["colour"] == "blue"


async def test_a_key_of_a_newer_version_is_named_not_read(registry, store):
    key = ApiKey(schema_version=99, id=KeyId("key_new"), name="new", sha256="0" * 64)
    await store.put("apikeys/key_new", msgspec.json.encode(key))
    snapshot = await registry.snapshot()
    assert (snapshot.api_keys, snapshot.unreadable) == ((), ("apikeys/key_new",))


async def test_a_store_that_is_away_makes_no_key(registry, store):
    await store.close()
    for call in (
        registry.create_api_key(NewApiKey(name="a")),
        registry.list_api_keys(),
        registry.revoke_api_key("a"),
    ):
        with pytest.raises(MetadataUnavailable):
            await call
