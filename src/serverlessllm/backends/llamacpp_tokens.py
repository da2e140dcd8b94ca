"""`/v1/tokenize`, `/v1/detokenize` and `/v1/rerank` by llama.cpp's own routes."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import msgspec

from serverlessllm.backends.dialect import Engine
from serverlessllm.backends.llamacpp_wire import context_tokens, detokenize, rank, render, spell
from serverlessllm.openai.rerank import RerankRequest, reranked
from serverlessllm.openai.tokenize import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)

_encoder = msgspec.json.Encoder()


async def tokenized(asked: TokenizeRequest, body: bytes, engine: Engine) -> AsyncIterator[bytes]:
    """The answer's body."""
    text = asked.prompt
    if text is None:
        text = await render(engine, body)
    # A chat is tokenized as a text is: its template leaves out what that begins with.
    special = True if asked.add_special_tokens is None else asked.add_special_tokens
    tokens = await spell(engine, text, special=special)
    answer = Tokenized(
        count=len(tokens),
        max_model_len=await context_tokens(engine),
        tokens=[token.id for token in tokens],
        token_strs=[token.text for token in tokens] if asked.return_token_strs else None,
    )
    yield _encoder.encode(answer)


async def detokenized(asked: DetokenizeRequest, engine: Engine) -> AsyncIterator[bytes]:
    """The answer's body."""
    yield _encoder.encode(Detokenized(prompt=await detokenize(engine, asked.tokens)))


async def ranked(asked: RerankRequest, engine: Engine) -> AsyncIterator[bytes]:
    """The answer's body."""
    ranking = await rank(engine, asked.query, asked.texts)
    answer = reranked(
        asked,
        ranking.scores,
        name=uuid.uuid4().hex,
        prompt_tokens=ranking.usage.prompt_tokens,
    )
    yield _encoder.encode(answer)
