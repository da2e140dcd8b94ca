"""The fields that name an answer: id, creation time, model, fingerprint."""

from __future__ import annotations

import msgspec

from serverlessllm.openai.answers.asked import Asked, Kind

_TIME_S_MAX = 1 << 40
_ID_CHARS_MAX = 256
_TIERS = frozenset({"auto", "default", "flex", "scale", "priority"})
_PREFIXES = ("chatcmpl-", "cmpl-")


class Stamp(msgspec.Struct, frozen=True):
    """What an answer is called where its engine does not say, or must not."""

    name: str
    """Unique; without the prefix that an answer's kind has."""
    created_s: int
    """Unix time."""
    promised: bool = False
    """Its client has seen it already: it holds whatever the engine says."""


class Said(msgspec.Struct):
    """What the engine says of these; it may be anything."""

    id: object = None
    created: object = None
    system_fingerprint: object = None
    service_tier: object = None


class Identity(msgspec.Struct, frozen=True):
    """What the answer says: one for all chunks of a stream."""

    name: str
    id: str
    created_s: int
    model: str
    system_fingerprint: str | None
    service_tier: str | None


def identify(asked: Asked, stamp: Stamp, said: Said) -> Identity:
    """The engine's own where it is of the right form, and nothing else was promised."""
    name, created_s = stamp.name, stamp.created_s
    if not stamp.promised:
        name, created_s = _own(stamp, said)
    mark, tier = said.system_fingerprint, said.service_tier
    return Identity(
        name=name,
        id=f"{'chatcmpl-' if asked.kind is Kind.CHAT else 'cmpl-'}{name}",
        created_s=created_s,
        model=asked.model,
        system_fingerprint=mark if isinstance(mark, str) else None,
        service_tier=tier if isinstance(tier, str) and tier in _TIERS else None,
    )


def _own(stamp: Stamp, said: Said) -> tuple[str, int]:
    """The engine's name and time."""
    name, created_s = stamp.name, stamp.created_s
    if isinstance(said.id, str) and 0 < len(said.id) <= _ID_CHARS_MAX:
        name = said.id
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix) or stamp.name
    if isinstance(said.created, int | float) and 0 < said.created < _TIME_S_MAX:
        created_s = int(said.created)
    return name, created_s
