"""What llama.cpp's server says, as far as its answers are made anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from serverlessllm.backends.dialect import Engine
from serverlessllm.core.errors import BackendProtocolError

COMPLETIONS = "/v1/completions"
VOCABULARY_MAX = 1 << 20
_FORCE = 1e9
"""Added to the logit of a token that has to come."""
T = TypeVar("T")


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One, as the engine scores it."""

    token: str
    id: int = -1
    logprob: float | None = None
    top_logprobs: list[Token] = []
    """The likeliest."""


class Scores(msgspec.Struct, frozen=True):
    content: list[Token] = []


class Choice(msgspec.Struct, frozen=True):
    index: int = 0
    text: str = ""
    logprobs: Scores | None = None
    finish_reason: str | None = None


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens = CachedTokens()


class Event(msgspec.Struct, frozen=True):
    choices: list[Choice] = []
    usage: Usage | None = None


class Filled(msgspec.Struct, frozen=True):
    """An event of `/infill`, or the answer of `/completion`."""

    content: str = ""
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    completion_probabilities: list[Token] = []


class _Tokens(msgspec.Struct, frozen=True):
    tokens: list[int]


class Spelled(msgspec.Struct, frozen=True):
    """A token, and how it is written."""

    id: int
    piece: str | list[int]
    """Bytes, where they are no text."""

    @property
    def text(self) -> str:
        if isinstance(self.piece, str):
            return self.piece
        return bytes(self.piece).decode("utf-8", "replace")


class _SpelledTokens(msgspec.Struct, frozen=True):
    tokens: list[Spelled]


class _Content(msgspec.Struct, frozen=True):
    content: str


class _Prompt(msgspec.Struct, frozen=True):
    prompt: str


class _Defaults(msgspec.Struct, frozen=True):
    n_ctx: int


class _Properties(msgspec.Struct, frozen=True):
    default_generation_settings: _Defaults


class _Ranked(msgspec.Struct, frozen=True):
    index: int
    relevance_score: float


class Ranking(msgspec.Struct, frozen=True):
    """Of documents."""

    results: list[_Ranked]
    usage: Usage = Usage()

    @property
    def scores(self) -> list[float]:
        """In the order of the documents."""
        return [one.relevance_score for one in sorted(self.results, key=lambda one: one.index)]


_event: msgspec.json.Decoder[Event | None] = msgspec.json.Decoder(Event | None)
_filled = msgspec.json.Decoder(Filled)
_tokens = msgspec.json.Decoder(_Tokens)
_spelled = msgspec.json.Decoder(_SpelledTokens)
_content = msgspec.json.Decoder(_Content)
_prompt = msgspec.json.Decoder(_Prompt)
_properties = msgspec.json.Decoder(_Properties)
_ranking = msgspec.json.Decoder(Ranking)
_encoder = msgspec.json.Encoder()


async def tokenize(engine: Engine, text: str, *, special: bool = True) -> list[int]:
    """A text's tokens; `special`: with those that the vocabulary begins each text with."""
    asked = {"content": text, "add_special": special, "parse_special": True}
    return _read(_tokens, await engine.ask("/tokenize", _encoder.encode(asked))).tokens


async def spell(engine: Engine, text: str, *, special: bool) -> list[Spelled]:
    """As `tokenize`, with each token's own text."""
    asked = {"content": text, "add_special": special, "parse_special": True, "with_pieces": True}
    return _read(_spelled, await engine.ask("/tokenize", _encoder.encode(asked))).tokens


async def spells(engine: Engine) -> bool:
    """Whether tokens are spelled as they read, which the engine's own constraints rely on: a
    vocabulary that begins each text with a space breaks them."""
    return [token.piece for token in await spell(engine, "{", special=False)] == ["{"]


async def render(engine: Engine, chat: bytes) -> str:
    """A chat's prompt, as its template writes it."""
    return _read(_prompt, await engine.ask("/apply-template", chat)).prompt


async def detokenize(engine: Engine, tokens: Sequence[int]) -> str:
    """The text of tokens."""
    said = await engine.ask("/detokenize", _encoder.encode({"tokens": tokens}))
    return _read(_content, said).content


async def score_next(
    engine: Engine, before: Sequence[int], *, force: int, alternatives: int
) -> Token | None:
    """The token that is made to come after `before`, scored as if it were not; None when it is
    only a piece of a character."""
    asked = {
        "prompt": before,
        "n_predict": 1,
        "logit_bias": [[force, _FORCE]],
        "temperature": 0,
        "n_probs": alternatives,
        "cache_prompt": True,
    }
    said = _read(_filled, await engine.ask("/completion", _encoder.encode(asked)))
    return said.completion_probabilities[0] if said.completion_probabilities else None


def usage_fields(usage: Usage) -> dict[str, object]:
    """As the API has it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": usage.prompt_tokens_details,
    }


async def context_tokens(engine: Engine) -> int:
    """Of the longest prompt and answer together."""
    return _read(_properties, await engine.get("/props")).default_generation_settings.n_ctx


async def rank(engine: Engine, query: str, documents: Sequence[str]) -> Ranking:
    """How well each document answers the query."""
    asked = {"query": query, "documents": documents}
    return _read(_ranking, await engine.ask("/v1/rerank", _encoder.encode(asked)))


def add_usage(one: Usage, other: Usage) -> Usage:
    """Of answers to two prompts together."""
    cached = one.prompt_tokens_details.cached_tokens + other.prompt_tokens_details.cached_tokens
    return Usage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        CachedTokens(cached),
    )


def another(one: Usage, other: Usage) -> Usage:
    """Of two answers to the same prompt, which is counted once."""
    first = one if one.prompt_tokens else other
    return msgspec.structs.replace(
        first, completion_tokens=one.completion_tokens + other.completion_tokens
    )


def read_event(data: bytes) -> Event | None:
    """llama.cpp begins a stream with `null`."""
    return _read(_event, data)


def read_filled(data: bytes) -> Filled:
    """An event or an answer of llama.cpp's own routes."""
    return _read(_filled, data)


def _read(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise BackendProtocolError(f"the model's backend sent no chunk: {error}") from None
