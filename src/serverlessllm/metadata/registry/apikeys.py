"""API keys: made, listed, revoked."""

from __future__ import annotations

import secrets

import msgspec

from serverlessllm.core.apikeys import KEY_PREFIX, ApiKey, NewApiKey, digest_of
from serverlessllm.core.clock import wall_s
from serverlessllm.core.errors import Conflict, RouteNotFound, Unavailable
from serverlessllm.core.ids import KeyId
from serverlessllm.metadata.base import ABSENT, RevisionMismatch
from serverlessllm.metadata.registry.keys import API_KEYS, api_key_key
from serverlessllm.metadata.registry.part import Part
from serverlessllm.metadata.registry.records import decode, encode, readable

_KEY_BYTES = 32
_ID_BYTES = 6


class ApiKeys(Part):
    """The part of the registry that keeps `apikeys/`."""

    async def create_api_key(self, wanted: NewApiKey) -> tuple[ApiKey, str]:
        """A new key's record, and its text, which nobody can read again.

        Raises:
            InvalidRequest: a value of `wanted` is out of range.
            Conflict: a key in use has that name, or there are too many.
        """
        now_s = wall_s()
        wanted.check(now_s)
        in_use = [key for key in await self.list_api_keys() if key.revoked_s is None]
        if any(key.name == wanted.name for key in in_use):
            raise Conflict(
                f"there is an API key {wanted.name!r} already: revoke it, or take another name",
                param="name",
            )
        if len(in_use) >= self._settings.api_keys_max:
            raise Conflict(f"there are {len(in_use)} API keys already: revoke one first")
        text = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
        key = ApiKey(
            id=KeyId(f"key_{secrets.token_hex(_ID_BYTES)}"),
            sha256=digest_of(text.encode()),
            created_s=now_s,
            **msgspec.structs.asdict(wanted),
        )
        try:
            await self._metadata.put(api_key_key(key.id), encode(key), expect_revision=ABSENT)
        except RevisionMismatch:  # by chance, once in 2^48
            raise Unavailable("the API key could not be made; try again") from None
        return key, text

    async def list_api_keys(self) -> tuple[ApiKey, ...]:
        """All keys by id, the newest revoked ones among them; unreadable records are left out."""
        listing = await self._metadata.list(API_KEYS)
        return tuple(r for e in listing.entries if (r := readable(e, ApiKey)) is not None)

    async def revoke_api_key(self, name: str) -> ApiKey:
        """End a key, named by its id or its name; its record as it is then. Idempotent by id.

        Raises:
            RouteNotFound: there is no such key.
            Conflict: several keys have that name.
        """
        found = await self._find(name)
        for _ in range(self._settings.conflict_retries_max):
            entry = await self._metadata.get(api_key_key(found))
            if entry is None:
                raise _unknown(name)
            key = decode(entry.value, ApiKey, entry.key)
            if key.revoked_s is not None:
                return key
            key = msgspec.structs.replace(key, revoked_s=wall_s())
            try:
                await self._metadata.put(
                    entry.key, encode(key, entry.value), expect_revision=entry.revision
                )
            except RevisionMismatch:
                continue
            await self._prune_api_keys()
            return key
        raise Unavailable(f"the API key {name} is being changed by too many at once; try again")

    async def _find(self, name: str) -> KeyId:
        """The id of the key that is meant: by id, else by its name among those in use."""
        keys = await self.list_api_keys()
        if any(key.id == name for key in keys):
            return KeyId(name)
        named = [key for key in keys if key.name == name and key.revoked_s is None]
        if not named:
            raise _unknown(name)
        if len(named) > 1:
            ids = ", ".join(key.id for key in named)
            raise Conflict(f"several API keys are called {name!r}: name one by its id: {ids}")
        return named[0].id

    async def _prune_api_keys(self) -> None:
        entries = (await self._metadata.list(API_KEYS)).entries
        revoked = [e for e in entries if (r := readable(e, ApiKey)) and r.revoked_s is not None]
        revoked.sort(key=lambda entry: entry.revision)
        for entry in revoked[: max(0, len(revoked) - max(1, self._settings.revoked_keys_kept_max))]:
            await self._metadata.delete(entry.key)


def _unknown(name: str) -> RouteNotFound:
    return RouteNotFound(f"there is no API key {name[:100]!r}; `sllm key list` shows them")
