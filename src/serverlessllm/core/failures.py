"""Errors on their way: one out of a group, as they are stored and sent (`JobError`), and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from serverlessllm.core.cluster import JobError
from serverlessllm.core.errors import ClientError, SLLMError, Unavailable

_STATUS_SERVER_MIN = 500


@contextlib.contextmanager
def single_error() -> Iterator[None]:
    """The first error of a task group instead of the group: the others follow from it."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def record_of(error: SLLMError) -> JobError:
    """What others are told of `error`."""
    return JobError(code=error.code, message=error.message, status=error.status)


def error_of(record: JobError) -> SLLMError:
    """The error that `record` was made of: its class by `code`.

    A code that this version does not know becomes the most general error of its status.
    """
    kind = next((kind for kind in _tree(SLLMError) if kind.code == record.code), None)
    if kind is None:
        kind = Unavailable if record.status >= _STATUS_SERVER_MIN else ClientError
    error = kind.__new__(kind)
    SLLMError.__init__(error, record.message)
    return error


def _tree(kind: type[SLLMError]) -> Iterator[type[SLLMError]]:
    """`kind` and what derives from it, the general before the special."""
    yield kind
    for special in kind.__subclasses__():
        yield from _tree(special)
