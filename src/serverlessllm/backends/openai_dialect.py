"""How somebody else's server is spoken to: the API as it stands, and vLLM's ways beyond it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import TypeVar

import msgspec
from msgspec import Raw

from serverlessllm.backends.dialect import (
    GENERATION,
    Ask,
    Composed,
    Engine,
    Operation,
    decode,
)
from serverlessllm.core.errors import UnsupportedOperation
from serverlessllm.openai.rerank import RerankRequest, reranked
from serverlessllm.openai.tokenize import Detokenized, Tokenized

_OURS = ("keep_alive", "user")
T = TypeVar("T")
_encoder = msgspec.json.Encoder()


class _Rank(msgspec.Struct, frozen=True):
    index: int
    relevance_score: float


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    total_tokens: int = 0


class _Ranking(msgspec.Struct, frozen=True):
    results: list[_Rank]
    usage: _Usage = _Usage()


class ForeignDialect(msgspec.Struct, frozen=True):
    """Every operation is tried: what the server has not, its answer shows."""

    model: str
    """The name that the server knows."""
    operations: frozenset[Operation] = frozenset(Operation)
    streams_usage: bool = True

    def translate(self, operation: Operation, body: bytes) -> Ask | Composed:
        """`backends.dialect.Dialect`."""
        if operation in GENERATION:
            return Ask(operation, body)
        fields = decode(body, dict[str, Raw])
        for field in _OURS:
            fields.pop(field, None)
        fields["model"] = Raw(_encoder.encode(self.model))
        if operation is Operation.TOKENIZE:
            return partial(_passed, operation, "/tokenize", fields, Tokenized)
        if operation is Operation.DETOKENIZE:
            return partial(_passed, operation, "/detokenize", fields, Detokenized)
        return partial(_ranked, fields, decode(body, RerankRequest))


async def _passed(
    operation: Operation,
    path: str,
    fields: dict[str, Raw],
    form: type[msgspec.Struct],
    engine: Engine,
) -> AsyncIterator[bytes]:
    """What the server says, if it says it in this form."""
    said = await engine.ask(path, _encoder.encode(fields))
    yield _encoder.encode(_read(operation, said, form))


async def _ranked(
    fields: dict[str, Raw], asked: RerankRequest, engine: Engine
) -> AsyncIterator[bytes]:
    """All scores, of which we tell as many as are asked for."""
    for field in ("top_n", "return_documents"):
        fields.pop(field, None)
    fields["documents"] = Raw(_encoder.encode(asked.texts))
    said = await engine.ask(Operation.RERANK, _encoder.encode(fields))
    ranking = _read(Operation.RERANK, said, _Ranking)
    scores = {rank.index: rank.relevance_score for rank in ranking.results}
    if scores.keys() != set(range(len(asked.documents))):
        raise _unknown_form(Operation.RERANK)
    usage = ranking.usage
    answer = reranked(
        asked,
        [scores[place] for place in range(len(scores))],
        name=uuid.uuid4().hex,
        prompt_tokens=usage.prompt_tokens or usage.total_tokens,
    )
    yield _encoder.encode(answer)


def _read(operation: Operation, said: bytes, form: type[T]) -> T:
    try:
        return msgspec.json.decode(said, type=form)
    except msgspec.DecodeError:
        raise _unknown_form(operation) from None


def _unknown_form(operation: Operation) -> UnsupportedOperation:
    return UnsupportedOperation(f"{operation}: the model's server answers in no known form")
