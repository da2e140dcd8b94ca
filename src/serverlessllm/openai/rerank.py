"""`POST /v1/rerank`: which of some documents answer a query best (Jina's and Cohere's form)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from serverlessllm.openai.request.checks import items_at_most, parsed
from serverlessllm.openai.request.fields import AtLeastOne, ParsedRequest, RequestFields
from serverlessllm.openai.request.read import read_request
from serverlessllm.openai.settings import RequestLimits


class Document(msgspec.Struct, frozen=True):
    """One of those to be ranked."""

    text: str


class RerankRequest(RequestFields, frozen=True, kw_only=True):
    """A query, and documents to be put in order."""

    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1)]
    top_n: AtLeastOne | None = None
    """How many to tell, the best first; null: all."""
    return_documents: bool | None = None
    """Tell their texts too."""

    @property
    def texts(self) -> list[str]:
        return [one if isinstance(one, str) else one.text for one in self.documents]


class Ranked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of the documents."""

    index: int
    """Its place in the request."""
    relevance_score: float
    """Higher is better; the scale is the model's."""
    document: Document | None = None


class RerankUsage(msgspec.Struct, frozen=True, kw_only=True):
    """In tokens."""

    prompt_tokens: int
    total_tokens: int


class Reranked(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    id: str
    model: str
    results: list[Ranked]
    usage: RerankUsage


_decoder = msgspec.json.Decoder(RerankRequest)


def parse_rerank(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check a rerank request; raises as `parse_chat`."""
    asked = read_request(_decoder, body, limits)
    items_at_most("documents", len(asked.documents), limits.inputs_max, "documents")
    return parsed(asked)


def reranked(
    asked: RerankRequest, scores: Sequence[float], *, name: str, prompt_tokens: int
) -> Reranked:
    """The answer to a request whose documents have these scores, in their order."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    texts = asked.texts
    return Reranked(
        id=f"rerank-{name}",
        model=asked.model,
        results=[
            Ranked(
                index=place,
                relevance_score=scores[place],
                document=Document(texts[place]) if asked.return_documents else None,
            )
            for place in order[: asked.top_n]
        ],
        usage=RerankUsage(prompt_tokens=prompt_tokens, total_tokens=prompt_tokens),
    )
