"""Answers in the making, and their two shapes: a whole body, or chunks of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Literal

import msgspec

from serverlessllm.backends.inside.transformers.generation import Generation, Generator, Update
from serverlessllm.backends.inside.transformers.sampling import Sampling, Score
from serverlessllm.backends.inside.transformers.text import Decoder, Stops, Text

Kind = Literal["chat", "text"]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said of one choice at once."""

    index: int
    text: str
    tokens: list[tuple[int, Score]]
    """With their scores, where they were asked for."""
    finish_reason: str | None


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that is wanted."""

    prompt: list[int]
    sampling: Sampling
    tokens_max: int
    echo: str = ""
    """Said before the answer."""


class Choice:
    """One answer: its text so far, and how it ended."""

    def __init__(self, index: int, order: Order, text: Text, stops: Sequence[str]) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.generation: Generation
        self._decoder = Decoder(text, order.prompt)
        self._stops = Stops(stops)
        self._held: list[tuple[int, Score]] = []
        self._echo = order.echo

    def take(self, update: Update, eos: frozenset[int]) -> Piece | None:
        """What the new tokens let it say; None: nothing yet."""
        tokens = update.tokens
        self.completion_tokens += len(tokens)
        ended = bool(tokens) and tokens[-1] in eos
        shown = tokens[:-1] if ended else tokens
        self._held += zip(shown, update.scores, strict=False)
        text = self._decoder.push(shown)
        if update.finished:
            text += self._decoder.rest()
        text = self._stops.push(text, whole=update.finished)
        if update.finished or self._stops.hit:
            self.finish_reason = "stop" if ended or self._stops.hit else "length"
        if not text and self.finish_reason is None and not self._echo:
            return None
        held, self._held = self._held, []
        text, self._echo = self._echo + text, ""
        return Piece(index=self.index, text=text, tokens=held, finish_reason=self.finish_reason)


class Answer:
    """All choices of one request. Use as a context: what is unfinished at its end is cancelled."""

    def __init__(
        self,
        generator: Generator,
        text: Text,
        eos: frozenset[int],
        orders: Sequence[Order],
        stops: Sequence[str],
    ) -> None:
        self.prompt_tokens = sum({id(order.prompt): len(order.prompt) for order in orders}.values())
        self.choices = [Choice(index, order, text, stops) for index, order in enumerate(orders)]
        self._generator = generator
        self._eos = eos
        self._orders = orders
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._started: list[Choice] = []

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        for choice in self._started:
            self._generator.cancel(choice.generation)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything, as it comes, of all choices.

        Raises:
            SLLMError: the engine failed.
        """
        for choice, order in zip(self.choices, self._orders, strict=True):
            choice.generation = self._generator.submit(
                order.prompt,
                order.sampling,
                order.tokens_max,
                self._eos,
                partial(self._take, choice.index),
            )
            self._started.append(choice)
        while any(choice.finish_reason is None for choice in self.choices):
            index, update = await self._updates.get()
            choice = self.choices[index]
            if update.error is not None:
                raise update.error
            if choice.finish_reason is None and (piece := choice.take(update, self._eos)):
                if piece.finish_reason is not None:
                    self._generator.cancel(choice.generation)  # a stop text came before its end
                yield piece

    @property
    def usage(self) -> dict[str, object]:
        """Token counts, in the API's shape."""
        completion = sum(choice.completion_tokens for choice in self.choices)
        cached = sum(choice.generation.cached_tokens for choice in self._started)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": min(cached, self.prompt_tokens)},
        }

    def _take(self, index: int, update: Update) -> None:
        self._updates.put_nowait((index, update))


class Shape:
    """How one request's choices are written."""

    def __init__(self, kind: Kind, text: Text, *, scored: bool) -> None:
        self._kind = kind
        self._text = text
        self._scored = scored
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, object]:
        """A chat's first chunk."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "finish_reason": None,
        }

    def chunk(self, piece: Piece) -> dict[str, object]:
        """The choice of one streamed chunk."""
        choice: dict[str, object] = {"index": piece.index, "finish_reason": piece.finish_reason}
        if self._kind == "chat":
            choice["delta"] = {"content": piece.text} if piece.text else {}
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._scores(piece) if self._scored and piece.tokens else None
        return choice

    def whole(self, piece: Piece) -> dict[str, object]:
        """The choice of an answer at once: `piece` is all of it."""
        choice: dict[str, object] = {"index": piece.index, "finish_reason": piece.finish_reason}
        if self._kind == "chat":
            choice["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._scores(piece) if self._scored else None
        return choice

    def _scores(self, piece: Piece) -> dict[str, object]:
        if self._kind == "chat":
            return {"content": [self._chat_score(*pair) for pair in piece.tokens], "refusal": None}
        names = [self._text.token(token)[0] for token, _ in piece.tokens]
        offset = self._offsets.get(piece.index, 0)
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        self._offsets[piece.index] = offset
        return {
            "tokens": names,
            "token_logprobs": [score.logprob for _, score in piece.tokens],
            "top_logprobs": [
                {self._text.token(token)[0]: logprob for token, logprob in score.alternatives}
                for _, score in piece.tokens
            ],
            "text_offset": offsets,
        }

    def _chat_score(self, token: int, score: Score) -> dict[str, object]:
        others = [self._named(*alternative) for alternative in score.alternatives]
        return self._named(token, score.logprob) | {"top_logprobs": others}

    def _named(self, token: int, logprob: float) -> dict[str, object]:
        text, data = self._text.token(token)
        return {"token": text, "logprob": logprob, "bytes": data}
