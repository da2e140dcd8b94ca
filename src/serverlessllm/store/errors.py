"""What object stores raise, said in the words of the error contract.

An object store's own text may carry a presigned URL or a SAS token: nothing of it leaves this
module but the reason we recognised in it.
"""

from __future__ import annotations

import re

from obstore.exceptions import (
    AlreadyExistsError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from serverlessllm.core.errors import OutOfSpace, SLLMError, StoreUnavailable


class ObjectMissing(Exception):
    """There is no such object."""


class ObjectExists(Exception):
    """A create-only put found the object there already."""


class ObjectChanged(StoreUnavailable):
    """The object is no longer the one that was pinned: start again from its head."""

    code = "store_object_changed"


class AccessDenied(StoreUnavailable):
    """The store refuses our credentials."""

    code = "store_access_denied"
    permanent = True


class StoreMisconfigured(StoreUnavailable):
    """The store cannot work as it is configured (no such bucket, an unknown option)."""

    code = "store_misconfigured"
    permanent = True


_DISK_FULL = ("no space left on device", "file too large", "disk quota exceeded", "os error 28")
_NO_BUCKET = ("nosuchbucket", "containernotfound", "the specified bucket does not exist")
_REASONS: tuple[tuple[str, str], ...] = (
    (r"connection refused", "it refuses connections"),
    (r"dns error|failed to lookup|name or service not known", "its host name is unknown"),
    (r"certificate|tls", "its TLS certificate is not accepted"),
    (r"timed? ?out", "it does not answer in time"),
    (r"non-partial response|contentrange|content-range", "it ignores ranges"),
    (
        r"decod|incomplete|end of file|unexpected length|connection (closed|reset)|body error",
        "it cut a body",
    ),
    (r"scheme is not allowed|invalid url, scheme", "http needs allow_http = true"),
)
_STATUS = re.compile(r"(?:status|http error)[^0-9]{0,20}([45]\d\d)", re.IGNORECASE)


def reason(text: str) -> str:
    """Why a call failed, in our own words."""
    lowered = text.lower()
    status = _status(text)
    if status is not None:
        return f"it answers with status {status}"
    for pattern, words in _REASONS:
        if re.search(pattern, lowered):
            return words
    return "the request failed"


def _status(text: str) -> int | None:
    found = _STATUS.search(text)
    return None if found is None else int(found[1])


def is_disk_full(text: str) -> bool:
    """Whether an error's text is one of the kernel's for a full disk, quota or file limit."""
    return any(sign in text.lower() for sign in _DISK_FULL)


def translate(error: Exception, where: str) -> Exception:
    """The typed error for what an object store raised at `where` (scheme and host).

    Returns `ObjectMissing` or `ObjectExists` for these two, else an `SLLMError`.
    """
    text = str(error)
    if any(sign in text.lower() for sign in _NO_BUCKET):
        return StoreMisconfigured(f"the store {where} has no such bucket: create it first")
    match error:
        case NotFoundError() | FileNotFoundError():
            return ObjectMissing()
        case AlreadyExistsError():
            return ObjectExists()
        case PreconditionError():
            return ObjectChanged(f"an object of the store {where} changed while it was read")
        case PermissionDeniedError() | UnauthenticatedError() | PermissionError():
            return _denied(where)
    if _status(text) in (401, 403):  # a listing: the client has no type for it
        return _denied(where)
    if is_disk_full(text):
        return OutOfSpace(f"the store {where} is full: free space or use another store")
    return StoreUnavailable(
        f"the store {where} is not available ({reason(text)}): check its URL, that it runs, "
        "and the network to it",
        retry_after_s=5.0,
    )


def _denied(where: str) -> AccessDenied:
    return AccessDenied(
        f"the store {where} refuses our credentials: check the store's keys and rights"
    )


def is_retryable(error: Exception) -> bool:
    """Whether the same call may succeed in a moment."""
    return isinstance(error, SLLMError) and type(error) is StoreUnavailable
