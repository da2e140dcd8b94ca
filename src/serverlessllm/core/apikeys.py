"""API keys: what is stored of one, what it allows, and what a request for one may say.

The text of a key is shown once, when it is made; what is stored is its SHA-256. That is enough for
256 random bits: a hash that is slow on purpose protects what people choose, not what chance did.
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum

import msgspec

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.core.ids import KeyId
from serverlessllm.core.models import SCHEMA_VERSION

KEY_PREFIX = "sk-sllm-"
"""Of every key's text: tools that look for leaked secrets find it by this."""
NAME_CHARS_MAX = 64
MODELS_MAX = 256
LIMIT_MAX = 10**12

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@ -]*[A-Za-z0-9])?")
_PATTERN = re.compile(r"(?:[A-Za-z0-9._@/-]*\*){0,3}[A-Za-z0-9._@/-]*")
_PATTERN_CHARS_MAX = 256


class Scope(StrEnum):
    """A group of routes; a key opens those of its scopes and no others."""

    INFERENCE = "inference"
    """`/v1/*`."""
    ADMIN = "admin"
    """`/api/*` and `/metrics`."""
    METRICS = "metrics"
    """`/metrics`."""


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """`apikeys/<id>` in the metadata store. A revoked one stays: it says that keys are asked for.

    Times are Unix times: a key's end is a date, and the one thing that the wall clock decides.
    """

    schema_version: int = SCHEMA_VERSION
    id: KeyId
    name: str
    sha256: str
    """64 lower-case hex digits, of the whole key."""
    scopes: tuple[Scope, ...] = (Scope.INFERENCE,)
    models: tuple[str, ...] = ()
    """Names, or patterns with `*`, of the models that it may use; empty: all."""
    created_s: int = 0
    expires_s: int | None = None
    revoked_s: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_at_once: int | None = None

    @property
    def limited(self) -> bool:
        """Whether its use is counted."""
        limits = (self.requests_per_minute, self.tokens_per_minute, self.requests_at_once)
        return limits != (None, None, None)


class NewApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a key shall be; the fields are those of `ApiKey`."""

    name: str
    scopes: tuple[Scope, ...] = (Scope.INFERENCE,)
    models: tuple[str, ...] = ()
    expires_s: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_at_once: int | None = None

    def check(self, now_s: int) -> None:
        """Raise `InvalidRequest` for a value out of range; `now_s` is Unix time."""
        if len(self.name) > NAME_CHARS_MAX or _NAME.fullmatch(self.name) is None:
            raise InvalidRequest(
                f"name: up to {NAME_CHARS_MAX} letters, digits and . _ @ - between them",
                param="name",
            )
        if not self.scopes:
            raise InvalidRequest("scopes: at least one", param="scopes")
        if len(self.models) > MODELS_MAX or not all(map(_is_pattern, self.models)):
            raise InvalidRequest(
                f"models: at most {MODELS_MAX} names of models, up to three `*` in one for any "
                "letters",
                param="models",
            )
        if self.expires_s is not None and self.expires_s <= now_s:
            raise InvalidRequest("expires_s: a Unix time to come", param="expires_s")
        for field in ("requests_per_minute", "tokens_per_minute", "requests_at_once"):
            limit = getattr(self, field)
            if limit is not None and not 1 <= limit <= LIMIT_MAX:
                raise InvalidRequest(f"{field}: from 1 to {LIMIT_MAX}", param=field)


def _is_pattern(text: str) -> bool:
    return 0 < len(text) <= _PATTERN_CHARS_MAX and _PATTERN.fullmatch(text) is not None


def digest_of(key: bytes) -> str:
    """What is stored of a key's text."""
    return hashlib.sha256(key).hexdigest()
