"""Models and aliases: compare-and-swap, names that belong to one model, versions of records."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from serverlessllm.core.errors import Conflict, InvalidModelName, UnreadableRecord
from serverlessllm.core.ids import CheckpointId, ModelId
from serverlessllm.core.models import SCHEMA_VERSION, CheckpointRef, ModelRecord, ModelSpec
from serverlessllm.metadata.base import ABSENT, Revision
from serverlessllm.metadata.registry import Registry
from serverlessllm.testing.metadata import FakeMetadata


def model(name: str, *aliases: str, checkpoint: str | None = None, **spec: object) -> ModelRecord:
    return ModelRecord(
        spec=msgspec.convert({"model": name, "aliases": aliases, **spec}, ModelSpec),
        checkpoint=ref(checkpoint) if checkpoint else None,
    )


def ref(checkpoint: str) -> CheckpointRef:
    return CheckpointRef(id=CheckpointId(checkpoint), prefix="m/1", size_bytes=10)


async def test_a_model_is_found_by_its_name_and_by_its_aliases(registry: Registry) -> None:
    stored = await registry.put_model(model("org/m@v1", "m", "fast"))
    for name in ("org/m@v1", "m", "fast"):
        assert await registry.resolve(name) == stored
    assert await registry.get_model(ModelId("m")) is None
    assert await registry.resolve("slow") is None
    with pytest.raises(InvalidModelName):
        await registry.resolve("../etc")


async def test_put_compares_with_the_revision_that_was_read(registry: Registry) -> None:
    first = await registry.put_model(model("m"), expect_revision=ABSENT)
    with pytest.raises(Conflict):
        await registry.put_model(model("m"), expect_revision=ABSENT)
    second = await registry.put_model(model("m", pinned=True), expect_revision=first.revision)
    assert second.revision > first.revision
    with pytest.raises(Conflict):
        await registry.put_model(model("m"), expect_revision=first.revision)
    with pytest.raises(Conflict):
        await registry.delete_model(ModelId("m"), expect_revision=first.revision)
    assert (await registry.list_models()) == (second,)


async def test_created_is_set_once(registry: Registry) -> None:
    first = await registry.put_model(model("m"))
    assert first.record.created_s > 0
    record = msgspec.structs.replace(first.record, created_s=5)
    assert (await registry.put_model(record)).record.created_s == first.record.created_s


async def test_one_alias_one_model(registry: Registry) -> None:
    await registry.put_model(model("a", "x"))
    with pytest.raises(Conflict, match="x is an alias of a"):
        await registry.put_model(model("b", "x"))
    with pytest.raises(Conflict, match="is the name of a model"):
        await registry.put_model(model("b", "a"))
    with pytest.raises(Conflict, match="x is an alias of a"):
        await registry.put_model(model("x"))
    with pytest.raises(Conflict, match="is the name of a model"):
        await registry.put_model(model("b", "b"))
    with pytest.raises(InvalidModelName):
        await registry.put_model(model("b", "no spaces"))
    assert [m.record.spec.model for m in await registry.list_models()] == ["a"]


async def test_an_alias_that_is_given_up_is_free(registry: Registry) -> None:
    await registry.put_model(model("a", "x", "y"))
    await registry.put_model(model("a", "y"))
    await registry.put_model(model("b", "x"))
    found = await registry.resolve("x")
    assert found is not None
    assert found.record.spec.model == "b"
    assert await registry.delete_model(ModelId("a"))
    assert not await registry.delete_model(ModelId("a"))
    await registry.put_model(model("c", "y"))


async def test_the_alias_of_a_writer_that_died_halfway_is_free(
    registry: Registry, store: FakeMetadata
) -> None:
    await store.put("aliases/x", b"never-written")
    assert await registry.resolve("x") is None
    await registry.put_model(model("a", "x"))
    found = await registry.resolve("x")
    assert found is not None
    assert found.record.spec.model == "a"


async def test_eight_models_want_one_alias_at_once(registry: Registry) -> None:
    results = await asyncio.gather(
        *(registry.put_model(model(f"m{i}", "x")) for i in range(8)), return_exceptions=True
    )
    found = await registry.resolve("x")
    assert found is not None
    holders = [m for m in await registry.list_models() if "x" in m.record.spec.aliases]
    assert holders == [found]
    assert sum(isinstance(r, Conflict) for r in results) == 7


async def test_concurrent_puts_all_land(registry: Registry) -> None:
    await asyncio.gather(*(registry.put_model(model("m", keep_alive_s=i)) for i in range(8)))
    assert len(await registry.list_models()) == 1


async def test_fields_of_a_newer_minor_version_are_kept(
    registry: Registry, store: FakeMetadata
) -> None:
    stored = await registry.put_model(model("m", "x", checkpoint="a" * 64, pinned=True))
    entry = await store.get("models/m")
    assert entry is not None
    raw = msgspec.json.decode(entry.value)
    raw["region"] = "moon"
    raw["spec"]["priority"] = 7
    raw["checkpoint"]["etag"] = "e1"
    await store.put("models/m", msgspec.json.encode(raw))

    await registry.put_model(model("m", checkpoint="a" * 64))
    entry = await store.get("models/m")
    assert entry is not None
    raw = msgspec.json.decode(entry.value)
    assert raw["region"] == "moon"
    assert raw["spec"] == {"model": "m", "priority": 7}  # known fields are as put: not pinned
    assert raw["checkpoint"]["etag"] == "e1"
    assert raw["created_s"] == stored.record.created_s

    await registry.put_model(model("m", checkpoint="b" * 64))
    entry = await store.get("models/m")
    assert entry is not None
    assert "etag" not in msgspec.json.decode(entry.value)["checkpoint"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b'{"schema_version": %d, "shape": []}' % (SCHEMA_VERSION + 1), "upgrade"),
        (b'{"schema_version": %d, "spec": {"model": "m"}}' % (SCHEMA_VERSION + 1), "upgrade"),
        (b'{"schema_version": 1, "spec": 5}', "damaged"),
        (b'{"schema_version": "x"}', "damaged"),
        (b"\xff\x00", "damaged"),
        (b"", "damaged"),
    ],
)
async def test_a_record_it_cannot_read_is_refused_and_hides_no_other(
    registry: Registry, store: FakeMetadata, value: bytes, says: str
) -> None:
    good = await registry.put_model(model("good"))
    await store.put("models/bad", value)
    await store.put("agents/bad", value)
    with pytest.raises(UnreadableRecord, match=says):
        await registry.get_model(ModelId("bad"))
    with pytest.raises(UnreadableRecord):
        await registry.put_model(model("bad"))
    assert await registry.list_models() == (good,)
    snapshot = await registry.snapshot()
    assert snapshot.models == (good,)
    assert snapshot.unreadable == ("agents/bad", "models/bad")
    assert await registry.delete_model(ModelId("bad"))


async def test_expecting_a_revision_of_a_missing_model(registry: Registry) -> None:
    with pytest.raises(Conflict):
        await registry.put_model(model("m"), expect_revision=Revision(3))
    assert await registry.list_models() == ()
