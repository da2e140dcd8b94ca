"""Answers in the making, and their two shapes: a whole body, or chunks of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Literal

import msgspec

from serverlessllm.backends.calls import Calls, Delta, delta_fields, message_fields
from serverlessllm.backends.inside.transformers.constraints import Constraint
from serverlessllm.backends.inside.transformers.generation import Generation, Generator, Update
from serverlessllm.backends.inside.transformers.sampling import Sampling, Score
from serverlessllm.backends.inside.transformers.text import Decoder, Stops, Text
from serverlessllm.backends.offsets import token_offsets
from serverlessllm.backends.tools import Toolset

Kind = Literal["chat", "text"]


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said of one choice at once."""

    index: int
    deltas: list[Delta]
    tokens: list[tuple[int, Score | None]]
    """With their scores, where they were asked for; a prompt's first token has none."""
    finish_reason: str | None
    stopped_by: str = ""
    """The stop text that ended it, if one did."""

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


class Echo(msgspec.Struct, frozen=True):
    """A prompt that its answer repeats."""

    text: str
    tokens: list[tuple[int, Score | None]] = []
    """Where scores were asked for."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that is wanted."""

    prompt: list[int]
    sampling: Sampling
    tokens_max: int
    """0: the prompt only."""
    echo: Echo | None = None
    constraint: Constraint | None = None
    toolset: Toolset = Toolset()
    """What it may call."""


class Choice:
    """One answer: its text so far, and how it ended."""

    def __init__(self, index: int, order: Order, text: Text, stops: Sequence[str]) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.completion_tokens = 0
        self.generation: Generation
        self._decoder = Decoder(text, order.prompt)
        self._stops = Stops(stops)
        self._calls = Calls(order.toolset.names, listed_only=order.toolset.forced)
        self._held: list[tuple[int, Score | None]] = []
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
        over = update.finished or bool(self._stops.hit)
        deltas = self._calls.push(text, whole=over)
        if over:
            self.finish_reason = "stop" if ended or self._stops.hit else "length"
            if self._calls.count and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        if not deltas and self.finish_reason is None and self._echo is None:
            return None
        return self._piece(deltas)

    def nothing(self) -> Piece:
        """All of an answer that was to have no tokens."""
        self.finish_reason = "length"
        return self._piece([])

    def _piece(self, deltas: list[Delta]) -> Piece:
        tokens, self._held = self._held, []
        echo, self._echo = self._echo, None
        if echo is not None:
            deltas = [Delta(text=echo.text), *deltas]
            tokens = [*echo.tokens, *tokens]
        return Piece(
            index=self.index,
            deltas=deltas,
            tokens=tokens,
            finish_reason=self.finish_reason,
            stopped_by=self._stops.hit,
        )


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
            if not order.tokens_max:
                yield choice.nothing()
                continue
            choice.generation = self._generator.submit(
                order.prompt,
                order.sampling,
                order.tokens_max,
                self._eos,
                partial(self._take, choice.index),
                order.constraint,
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


def joined(parts: Sequence[Piece]) -> Piece:
    """All of one choice."""
    return Piece(
        index=parts[-1].index,
        deltas=[delta for part in parts for delta in part.deltas],
        tokens=[token for part in parts for token in part.tokens],
        finish_reason=parts[-1].finish_reason,
        stopped_by=parts[-1].stopped_by,
    )


def likeliest(pieces: Sequence[Piece], made: int, wanted: int) -> list[Piece]:
    """Of each `made` whole answers the `wanted` likeliest, by token, so that a short one is not
    the better one; they are numbered anew."""
    chosen: list[Piece] = []
    for start in range(0, len(pieces), made):
        some = sorted(pieces[start : start + made], key=_unlikelihood)[:wanted]
        chosen += some
    return [msgspec.structs.replace(piece, index=index) for index, piece in enumerate(chosen)]


def _unlikelihood(piece: Piece) -> float:
    scores = [score.logprob for _, score in piece.tokens if score is not None]
    return -sum(scores) / len(scores) if scores else 0.0


def _stop_reason(piece: Piece) -> dict[str, object]:
    """By vLLM's name, where there is one: which of the stop texts ended the answer."""
    return {"stop_reason": piece.stopped_by} if piece.stopped_by else {}


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
            choice["delta"] = delta_fields(piece.deltas)
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._scores(piece) if self._scored and piece.tokens else None
        return choice | _stop_reason(piece)

    def whole(self, piece: Piece) -> dict[str, object]:
        """The choice of an answer at once: `piece` is all of it."""
        choice: dict[str, object] = {"index": piece.index, "finish_reason": piece.finish_reason}
        if self._kind == "chat":
            said = message_fields(piece.deltas)
            choice["message"] = {"role": "assistant", "refusal": None} | said
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._scores(piece) if self._scored else None
        return choice | _stop_reason(piece)

    def _scores(self, piece: Piece) -> dict[str, object]:
        if self._kind == "chat":
            return {"content": [self._chat_score(*pair) for pair in piece.tokens], "refusal": None}
        names = [self._text.token(token)[0] for token, _ in piece.tokens]
        offset = self._offsets.get(piece.index, 0)
        self._offsets[piece.index] = offset + len(piece.text)
        return {
            "tokens": names,
            "token_logprobs": [score and score.logprob for _, score in piece.tokens],
            "top_logprobs": [
                score and {self._text.token(token)[0]: value for token, value in score.alternatives}
                for _, score in piece.tokens
            ],
            "text_offset": token_offsets(piece.text, names, offset),
        }

    def _chat_score(self, token: int, score: Score | None) -> dict[str, object]:
        assert score is not None, "only of a prompt's first token there is none"
        others = [self._named(*alternative) for alternative in score.alternatives]
        return self._named(token, score.logprob) | {"top_logprobs": others}

    def _named(self, token: int, logprob: float) -> dict[str, object]:
        text, data = self._text.token(token)
        return {"token": text, "logprob": logprob, "bytes": data}
