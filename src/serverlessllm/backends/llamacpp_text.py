"""Completions that llama.cpp's server does not answer as the API has it, made of what it does.

It counts the tokens of the first of several prompts only, and knows neither `echo`, `best_of`,
`suffix`, nor log probabilities of a prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import msgspec
from msgspec import Raw

from serverlessllm.backends.dialect import Engine
from serverlessllm.backends.llamacpp_wire import (
    COMPLETIONS,
    VOCABULARY_MAX,
    Token,
    Usage,
    add_usage,
    another,
    detokenize,
    read_event,
    read_filled,
    score_next,
    tokenize,
    usage_fields,
)
from serverlessllm.backends.offsets import token_offsets
from serverlessllm.core.errors import BackendProtocolError, InvalidRequest
from serverlessllm.core.failures import single_error

TOKENS_MAX = 16
"""Of an answer, where the request does not say: the API's own default."""
_OURS = ("prompt", "n", "best_of", "echo", "suffix", "logprobs", "max_tokens", "stream_options")
_REASONS = {"limit": "length"}

Prompt = str | list[int]


class TextAsk(msgspec.Struct, frozen=True, kw_only=True):
    """What decides how a completion is put to the engine."""

    prompt: str | list[str | int | list[int]]
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    suffix: str | None = None
    stream: bool | None = None
    seed: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the engine answers it as it stands, but for the length of the answer."""
        return (
            isinstance(self.prompt, str)
            and self.prompt != ""
            and not (self.echo or self.suffix)
            and self.logprobs != 0
            and self.max_tokens != 0
            and (self.best_of or 1) == (self.n or 1)
        )

    @property
    def answers(self) -> int:
        """To each prompt."""
        return self.n or 1

    @property
    def prompts(self) -> list[Prompt]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class Piece(msgspec.Struct, kw_only=True):
    """More of one answer."""

    index: int
    text: str = ""
    scores: list[Token] = []
    finish_reason: str | None = None


_fields = msgspec.json.Decoder(dict[str, Raw])
_encoder = msgspec.json.Encoder()


class Texts:
    """One such request; called once, with its engine."""

    def __init__(self, ask: TextAsk, body: bytes, *, scored_tokens_max: int, at_once: int) -> None:
        """`scored_tokens_max`: of a prompt whose own log probabilities are wanted. `at_once`:
        prompts that the engine is asked at the same time.

        Raises:
            InvalidRequest: the engine cannot fill in more than a text.
        """
        self._ask = ask
        fields = _fields.decode(body)
        for field in _OURS:
            fields.pop(field, None)
        self._common = fields
        self._scored_tokens_max = scored_tokens_max
        self._at_once = asyncio.Semaphore(at_once)
        self._usage = Usage()
        if ask.suffix and not isinstance(ask.prompt, str):
            raise InvalidRequest("suffix: only with one prompt, a text", param="suffix")
        self._alternatives = ask.logprobs or 0
        self._offsets: dict[int, int] = {}

    async def __call__(self, engine: Engine) -> AsyncIterator[bytes]:
        """`backends.dialect.Composed`."""
        prompts = self._ask.prompts
        if not self._ask.stream:
            pieces = await self._whole(engine, prompts)
            yield self._body([self._choice(piece) for piece in pieces], usage=True)
            return
        for number, prompt in enumerate(prompts):
            async for piece in self._pieces(engine, number, prompt):
                yield b"data: " + self._body([self._choice(piece)], usage=False) + b"\n\n"
        yield b"data: " + self._body([], usage=True) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _body(self, choices: list[dict[str, object]], *, usage: bool) -> bytes:
        body: dict[str, object] = {"object": "text_completion", "choices": choices}
        if usage:
            body["usage"] = usage_fields(self._usage)
        return _encoder.encode(body)

    def _choice(self, piece: Piece) -> dict[str, object]:
        scores = None
        if self._ask.logprobs is not None:
            offset = self._offsets.get(piece.index, 0)
            tokens = [token.token for token in piece.scores]
            self._offsets[piece.index] = offset + len(piece.text)
            scores = {
                "tokens": tokens,
                "token_logprobs": [token.logprob for token in piece.scores],
                "top_logprobs": [_top(token, self._alternatives) for token in piece.scores],
                "text_offset": token_offsets(piece.text, tokens, offset),
            }
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": scores,
            "finish_reason": piece.finish_reason,
        }

    async def _whole(self, engine: Engine, prompts: Sequence[Prompt]) -> list[Piece]:
        """The answers to all prompts, some at the same time."""

        async def one(number: int, prompt: Prompt) -> list[Piece]:
            async with self._at_once:
                return await _joined(self._pieces(engine, number, prompt))

        with single_error():
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(one(number, prompt), name="llamacpp-prompt")
                    for number, prompt in enumerate(prompts)
                ]
        return [piece for task in tasks for piece in task.result()]

    async def _pieces(self, engine: Engine, number: int, prompt: Prompt) -> AsyncIterator[Piece]:
        """The answers to one prompt, as they come."""
        if not prompt and not await self._tokens(engine, prompt):
            raise InvalidRequest(
                "prompt: it is empty, and the model's vocabulary has no token to begin a text with",
                param="prompt",
            )
        first = number * self._ask.answers
        places = range(first, first + self._ask.answers)
        if self._ask.echo:
            echo = await self._echo(engine, prompt)
            for place in places:
                yield Piece(index=place, text=echo.text, scores=echo.scores)
        if self._ask.max_tokens == 0:
            self._count(Usage(len(await self._tokens(engine, prompt))))
            for place in places:
                yield Piece(index=place, finish_reason="length")
            return
        pieces = self._generated(engine, prompt, first)
        made = self._ask.best_of or 0
        if made > self._ask.answers:
            likeliest = sorted(await _joined(pieces), key=_unlikelihood)[: self._ask.answers]
            for place, piece in zip(places, likeliest, strict=True):
                piece.index = place
                yield piece
            return
        async for piece in pieces:
            yield piece

    async def _generated(self, engine: Engine, prompt: Prompt, first: int) -> AsyncIterator[Piece]:
        ask = self._ask
        made = max(ask.best_of or 1, ask.answers)
        scored = ask.logprobs is not None or made > ask.answers
        asked: dict[str, object] = self._common | {
            "prompt": prompt,
            "max_tokens": TOKENS_MAX if ask.max_tokens is None else ask.max_tokens,
            "stream": True,
        }
        if ask.suffix:
            for place in range(made):
                asked |= {} if ask.seed is None else {"seed": ask.seed + place}
                asked |= {"n_probs": max(1, self._alternatives)} if scored else {}
                async for piece in self._filled(engine, asked, first + place):
                    yield piece
            return
        asked |= {"n": made, "stream_options": {"include_usage": True}}
        asked |= {"logprobs": max(1, self._alternatives)} if scored else {}
        spent = Usage()
        async for data in engine.stream(COMPLETIONS, _encoder.encode(asked)):
            event = read_event(data)
            if event is None:
                continue
            if event.usage is not None:
                spent = another(spent, event.usage)
            for choice in event.choices:
                yield Piece(
                    index=first + choice.index,
                    text=choice.text,
                    scores=[] if choice.logprobs is None else choice.logprobs.content,
                    finish_reason=choice.finish_reason,
                )
        self._count(spent)

    async def _filled(
        self, engine: Engine, asked: dict[str, object], index: int
    ) -> AsyncIterator[Piece]:
        """One answer between `prompt` (the only one) and `suffix`."""
        asked = asked | {
            "input_prefix": asked["prompt"],
            "input_suffix": self._ask.suffix,
            "n_predict": asked["max_tokens"],
        }
        del asked["prompt"]
        async with contextlib.aclosing(engine.stream("/infill", _encoder.encode(asked))) as events:
            async for data in events:
                event = read_filled(data)
                yield Piece(
                    index=index,
                    text=event.content,
                    scores=event.completion_probabilities,
                    finish_reason=_REASONS.get(event.stop_type, "stop") if event.stop else None,
                )
                if event.stop:  # this stream has no other end
                    spent = Usage(event.tokens_evaluated, event.tokens_predicted)
                    self._usage = another(self._usage, spent)
                    return
        raise BackendProtocolError("the model's backend ended its stream early")

    def _count(self, usage: Usage) -> None:
        self._usage = add_usage(self._usage, usage)

    async def _tokens(self, engine: Engine, prompt: Prompt) -> list[int]:
        return await tokenize(engine, prompt) if isinstance(prompt, str) else prompt

    async def _echo(self, engine: Engine, prompt: Prompt) -> Piece:
        """The prompt, as an answer begins with it."""
        text = prompt if isinstance(prompt, str) else await detokenize(engine, prompt)
        scores: list[Token] = []
        if self._ask.logprobs is not None:
            tokens = await self._tokens(engine, prompt)
            if len(tokens) > self._scored_tokens_max:
                raise InvalidRequest(
                    f"echo: log probabilities of at most {self._scored_tokens_max} tokens of a "
                    f"prompt, and this one has {len(tokens)}; the model's option "
                    "scored_tokens_max allows more",
                    param="echo",
                )
            scores = await self._score(engine, tokens)
        return Piece(index=0, text=text, scores=scores)

    async def _score(self, engine: Engine, tokens: Sequence[int]) -> list[Token]:
        """Each token of a prompt by its log probability after those before it. The engine scores
        only what it generates: so each is generated, the one that must come being forced, which
        it scores as if it were not. What stands before it is in its cache."""
        first = Token(token=await detokenize(engine, tokens[:1]))
        return [
            first,
            *[
                await self._score_last(engine, tokens[: place + 1])
                for place in range(1, len(tokens))
            ],
        ]

    async def _score_last(self, engine: Engine, tokens: Sequence[int]) -> Token:
        *before, last = tokens
        count = max(1, self._alternatives)
        scored = await score_next(engine, before, force=last, alternatives=count)
        if scored is not None:
            return scored
        # It is a piece of a character, and the engine scores whole ones only: so another is forced,
        # and all that could have been are told.
        plain = (await tokenize(engine, "a", special=False))[-1]
        scored = await score_next(engine, before, force=plain, alternatives=VOCABULARY_MAX)
        found = [token for token in scored.top_logprobs if token.id == last] if scored else []
        if scored is None or not found:
            raise BackendProtocolError("the model's backend scored nothing")
        return msgspec.structs.replace(found[0], top_logprobs=scored.top_logprobs[:count])


async def _joined(pieces: AsyncIterator[Piece]) -> list[Piece]:
    """Each answer in one piece."""
    answers: dict[int, Piece] = {}
    async for piece in pieces:
        whole = answers.setdefault(piece.index, Piece(index=piece.index))
        whole.text += piece.text
        whole.scores = whole.scores + piece.scores
        whole.finish_reason = piece.finish_reason or whole.finish_reason
    return [answers[index] for index in sorted(answers)]


def _unlikelihood(piece: Piece) -> float:
    """By token, so that a short answer is not the better one."""
    if not piece.scores:
        return 0.0
    return -sum(token.logprob or 0.0 for token in piece.scores) / len(piece.scores)


def _top(token: Token, count: int) -> dict[str, float | None] | None:
    if token.logprob is None:
        return None
    return {other.token: other.logprob for other in token.top_logprobs[:count]}
