"""Models and the aliases they are known by."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from serverlessllm.core.clock import wall_s
from serverlessllm.core.errors import Conflict, Unavailable
from serverlessllm.core.ids import ModelId, parse_model_id
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.metadata.base import ABSENT, Entry, Revision, RevisionMismatch
from serverlessllm.metadata.registry.changes import StoredModel
from serverlessllm.metadata.registry.keys import MODELS, alias_key, model_key
from serverlessllm.metadata.registry.part import Part
from serverlessllm.metadata.registry.records import decode, encode, readable


class Models(Part):
    """The part of the registry that keeps `models/` and `aliases/`.

    The key of an alias says whose it is. One whose model does not list it (its writer died
    halfway) is free for the next to take.
    """

    async def get_model(self, model: ModelId) -> StoredModel | None:
        """The model of exactly this canonical name.

        Raises:
            UnreadableRecord: its record is damaged or of a newer version.
        """
        entry = await self._metadata.get(model_key(model))
        return None if entry is None else _stored(entry)

    async def resolve(self, name: str) -> StoredModel | None:
        """The model that a client means: its canonical name, else an alias.

        Raises:
            InvalidModelName: it could not be a model's name.
        """
        model = parse_model_id(name)
        found = await self.get_model(model)
        if found is not None:
            return found
        alias = await self._metadata.get(alias_key(name))
        return None if alias is None else await self._holder(alias, name)

    async def list_models(self) -> tuple[StoredModel, ...]:
        """All models by name; unreadable records are left out (logged, counted)."""
        listing = await self._metadata.list(MODELS)
        return tuple(m for e in listing.entries if (m := readable_model(e)) is not None)

    async def put_model(
        self, record: ModelRecord, *, expect_revision: Revision | None = None
    ) -> StoredModel:
        """Create or replace a model; `expect_revision` as read before (ABSENT: create only).

        `created_s` is set on creation and kept afterwards.

        Raises:
            Conflict: the revision is another, or a name of it belongs to another model.
            InvalidModelName: its name, or an alias, is not a model's name.
        """
        model = record.spec.model
        for name in (model, *record.spec.aliases):
            parse_model_id(name)
        for _ in range(self._settings.conflict_retries_max):
            entry = await self._metadata.get(model_key(model))
            if expect_revision is not None and _revision(entry) != expect_revision:
                raise _changed(model)
            await self._claim_names(record.spec)
            try:
                stored = await self._write_model(record, entry)
            except RevisionMismatch:
                continue  # with expect_revision, the next round says so
            before = None if entry is None else readable_model(entry)
            if before is not None:
                dropped = set(before.record.spec.aliases) - set(record.spec.aliases)
                await self._release_aliases(model, dropped)
            await self._confirm_aliases(stored)
            return stored
        raise Unavailable(f"model {model} is being changed by too many at once; try again")

    async def delete_model(
        self, model: ModelId, *, expect_revision: Revision | None = None
    ) -> bool:
        """Forget a model and its aliases; whether it existed. Its checkpoint stays in the store.

        Raises:
            Conflict: its revision is not `expect_revision`.
        """
        entry = await self._metadata.get(model_key(model))
        try:
            existed = await self._metadata.delete(model_key(model), expect_revision=expect_revision)
        except RevisionMismatch:
            raise _changed(model) from None
        gone = None if entry is None else readable_model(entry)
        if gone is not None:
            await self._release_aliases(model, gone.record.spec.aliases)
        return existed

    async def _write_model(self, record: ModelRecord, entry: Entry | None) -> StoredModel:
        """Write over exactly `entry`; raises RevisionMismatch, and UnreadableRecord over a newer
        version's."""
        before = None if entry is None else _stored(entry).record
        created_s = (before.created_s if before else 0) or record.created_s or wall_s()
        record = msgspec.structs.replace(record, created_s=created_s)
        revision = await self._metadata.put(
            model_key(record.spec.model),
            encode(record, entry.value if entry else None),
            expect_revision=_revision(entry),
        )
        return StoredModel(record=record, revision=revision)

    async def _claim_names(self, spec: ModelSpec) -> None:
        shadowed = await self._metadata.get(alias_key(spec.model))
        if shadowed is not None and await self._holder(shadowed, spec.model) is not None:
            raise _alias_taken(spec.model, shadowed)
        for alias in spec.aliases:
            if await self._metadata.get(model_key(alias)) is not None or alias == spec.model:
                raise Conflict(f"alias {alias} is the name of a model", param="aliases")
            await self._claim_alias(alias, spec.model)

    async def _claim_alias(self, alias: str, model: ModelId) -> None:
        entry = await self._metadata.get(alias_key(alias))
        if entry is not None and entry.value.decode() == model:
            return
        if entry is not None and await self._holder(entry, alias) is not None:
            raise _alias_taken(alias, entry)
        try:
            await self._metadata.put(
                alias_key(alias), model.encode(), expect_revision=_revision(entry)
            )
        except RevisionMismatch:
            raise _alias_taken(alias, await self._metadata.get(alias_key(alias))) from None

    async def _holder(self, entry: Entry, alias: str) -> StoredModel | None:
        """The model that an alias's key names, if it lists the alias."""
        holder = await self.get_model(ModelId(entry.value.decode()))
        return holder if holder and alias in holder.record.spec.aliases else None

    async def _confirm_aliases(self, stored: StoredModel) -> None:
        """Give up an alias that another model took between our claim of it and our write."""
        spec = stored.record.spec
        for alias in spec.aliases:
            entry = await self._metadata.get(alias_key(alias))
            if entry is not None and entry.value.decode() == spec.model:
                continue
            kept = tuple(a for a in spec.aliases if a != alias)
            without = msgspec.structs.replace(
                stored.record, spec=msgspec.structs.replace(spec, aliases=kept)
            )
            await self.put_model(without, expect_revision=stored.revision)
            raise _alias_taken(alias, entry)

    async def _release_aliases(self, model: ModelId, aliases: Iterable[str]) -> None:
        for alias in aliases:
            entry = await self._metadata.get(alias_key(alias))
            if entry is not None and entry.value.decode() == model:
                await self._delete_if_unchanged(entry)

    async def _delete_if_unchanged(self, entry: Entry) -> None:
        try:
            await self._metadata.delete(entry.key, expect_revision=entry.revision)
        except RevisionMismatch:
            return  # somebody else has it now


def readable_model(entry: Entry) -> StoredModel | None:
    """The model of an entry, or None (logged, counted) when this version cannot read it."""
    record = readable(entry, ModelRecord)
    return None if record is None else StoredModel(record=record, revision=entry.revision)


def _stored(entry: Entry) -> StoredModel:
    record = decode(entry.value, ModelRecord, entry.key)
    return StoredModel(record=record, revision=entry.revision)


def _revision(entry: Entry | None) -> Revision:
    return ABSENT if entry is None else entry.revision


def _changed(model: ModelId) -> Conflict:
    return Conflict(f"model {model} was changed meanwhile: read it again", param="model")


def _alias_taken(alias: str, entry: Entry | None) -> Conflict:
    holder = "another model" if entry is None else entry.value.decode()
    return Conflict(f"{alias} is an alias of {holder}", param="aliases")
