"""The seam between the API and one engine's HTTP: what it has, and how a request is put to it.

An adapter whose engine departs from the API has a method `dialect(spec)` (`Speaks`); one without
speaks it as it stands. The agent asks the dialect once a request; what comes back from the engine
is made spec-complete afterwards by `serverlessllm.openai.answers`.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from enum import StrEnum
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from serverlessllm.core.errors import InvalidRequest, UnsupportedOperation
from serverlessllm.core.models import ModelSpec

T = TypeVar("T")


class Operation(StrEnum):
    """What a client may ask a model for; the value is its route."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    TOKENIZE = "/v1/tokenize"
    DETOKENIZE = "/v1/detokenize"
    RERANK = "/v1/rerank"


GENERATION = frozenset({Operation.CHAT, Operation.COMPLETIONS, Operation.EMBEDDINGS})
"""What every server that speaks OpenAI may be asked for."""


class Ask(msgspec.Struct, frozen=True):
    """One POST to the engine's server."""

    path: str
    body: bytes


class Engine(Protocol):
    """The engine's server, for an answer that takes more than one request."""

    async def ask(self, path: str, body: bytes) -> bytes:
        """POST; the body of a 2xx answer.

        Raises:
            SLLMError: the server refused or failed, translated.
        """
        ...

    async def get(self, path: str) -> bytes:
        """GET; raises as `ask`."""
        ...

    def stream(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """POST; the data of each server-sent event but `[DONE]`; raises as `ask`."""
        ...


Composed = Callable[[Engine], AsyncIterator[bytes]]
"""The pieces of an answer's body as an engine would send them: one piece of JSON, or for a request
with `stream` whole events (`data: …`, the last `data: [DONE]`). What it raises before its first
piece is the answer."""


class Dialect(Protocol):
    """How one model's engine is spoken to. A stateless value."""

    @property
    def operations(self) -> frozenset[Operation]:
        """What it has; the agent refuses the rest by `check_operation`."""
        ...

    @property
    def streams_usage(self) -> bool:
        """Whether `stream_options.include_usage` brings a usage chunk at the stream's end."""
        ...

    def translate(self, operation: Operation, body: bytes) -> Ask | Composed:
        """A checked request, in the engine's words. On the hot path: without anything to change
        it returns `body` itself.

        Raises:
            InvalidRequest: this engine cannot do what a field says; `param` names it.
        """
        ...


@runtime_checkable
class Speaks(Protocol):
    """A backend with a dialect of its own."""

    def dialect(self, spec: ModelSpec) -> Dialect: ...


_decoder: Callable[[Any], msgspec.json.Decoder[Any]] = functools.cache(msgspec.json.Decoder)


def decode(body: bytes, type_: type[T]) -> T:
    """A checked request.

    Raises:
        InvalidRequest: it was not checked.
    """
    try:
        decoded: T = _decoder(type_).decode(body)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the request is not valid: {error}") from None
    return decoded


class PlainDialect(msgspec.Struct, frozen=True):
    """The API as it stands."""

    operations: frozenset[Operation] = GENERATION
    streams_usage: bool = True

    def translate(self, operation: Operation, body: bytes) -> Ask | Composed:
        return Ask(operation, body)


def dialect_of(backend: object, spec: ModelSpec) -> Dialect:
    """How the instances of `spec` on this backend are spoken to; to be asked once an instance."""
    return backend.dialect(spec) if isinstance(backend, Speaks) else PlainDialect()


def check_operation(dialect: Dialect, operation: Operation) -> None:
    """Refuse by name what the engine does not have.

    Raises:
        UnsupportedOperation: it is not one of the dialect's.
    """
    if operation not in dialect.operations:
        known = ", ".join(sorted(dialect.operations))
        raise UnsupportedOperation(
            f"{operation}: the model's backend does not have it; it has {known}"
        )
