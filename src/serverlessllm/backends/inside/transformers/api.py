"""The routes of the engine's server."""

from __future__ import annotations

import asyncio
import base64
import uuid
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar, cast

import msgspec
import torch
from transformers import PreTrainedModel

from serverlessllm.backends.base import BackendStats
from serverlessllm.backends.inside.transformers.answers import Answer, Kind, Order, Piece, Shape
from serverlessllm.backends.inside.transformers.arrivals import Wait
from serverlessllm.backends.inside.transformers.asks import (
    ANSWERS_MAX,
    ChatAsk,
    CompletionAsk,
    Defaults,
    EmbeddingAsk,
    read,
    sampling,
    texts,
)
from serverlessllm.backends.inside.transformers.generation import Generator
from serverlessllm.backends.inside.transformers.text import Text
from serverlessllm.backends.inside.transformers.weights import Weights
from serverlessllm.core.clock import wall_s
from serverlessllm.core.errors import InvalidRequest, MethodNotAllowed, RouteNotFound, SLLMError
from serverlessllm.edge.server import Request
from serverlessllm.openai.errors import ContextTooLong, error_body
from serverlessllm.openai.sse import DONE, EVENT_STREAM_HEADERS

_JSON = (("content-type", "application/json"),)
_LONG_CHARS = 16_384
"""A longer text is made into tokens beside the event loop."""
_encoder = msgspec.json.Encoder()
_T = TypeVar("_T")


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /trace`: how a start overlapped its load; times of the machine's monotonic clock."""

    layers: list[Wait]
    """In the order in which they first computed; empty when all was here at the start."""
    chunks: dict[int, float]
    """When each chunk was heard of."""


class Api:
    """One model's OpenAI API."""

    def __init__(
        self,
        *,
        model: str,
        weights: Weights,
        text: Text,
        generator: Generator,
        defaults: Defaults,
        eos: frozenset[int],
        context: int,
        embeddings: bool,
    ) -> None:
        """`context`: tokens of the longest prompt and answer together."""
        self._model = model
        self._weights = weights
        self._text = text
        self._generator = generator
        self._defaults = defaults
        self._eos = eos
        self._context = context
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="beside")
        self._aside = 0
        self._routes: dict[tuple[str, str], Callable[[Request], object]] = {
            ("GET", "/health"): lambda request: request.respond(200, _JSON, b'{"status":"ok"}'),
            ("GET", "/stats"): lambda request: self._tell(request, self._stats()),
            ("GET", "/trace"): lambda request: self._tell(request, self._trace()),
            ("GET", "/v1/models"): lambda request: self._tell(request, self._models()),
        }
        self._posts = {"/v1/chat/completions": self._chat, "/v1/completions": self._complete}
        if embeddings:
            self._posts["/v1/embeddings"] = self._embed

    async def handle(self, request: Request) -> None:
        """One request."""
        told = self._routes.get((request.method, request.path))
        if told is not None:
            told(request)
        elif request.path not in self._posts:
            raise RouteNotFound(f"no route {request.path}")
        elif request.method != "POST":
            raise MethodNotAllowed(f"{request.method} is not a method of {request.path}")
        else:
            await self._posts[request.path](request)

    async def _chat(self, request: Request) -> None:
        ask = read(await request.body(), ChatAsk)
        messages = ask.chat()
        size = sum(len(message.content) for message in messages)
        prompt = await self._beside_if(
            size > _LONG_CHARS,
            lambda: self._text.encode_chat(
                messages,
                generation_prompt=ask.add_generation_prompt and not ask.continue_final_message,
                continue_last=ask.continue_final_message,
            ),
        )
        orders = self._orders(ask, "messages", [prompt], [""])
        await self._answer(request, "chat", ask, orders)

    async def _complete(self, request: Request) -> None:
        ask = read(await request.body(), CompletionAsk)
        given = texts("prompt", ask.prompt)
        prompts = [await self._tokens("prompt", one) for one in given]
        echoes = [""] * len(given)
        if ask.echo:
            echoes = [one if isinstance(one, str) else self._text.decode(one) for one in given]
        orders = self._orders(ask, "prompt", prompts, echoes)
        await self._answer(request, "text", ask, orders)

    def _orders(
        self,
        ask: ChatAsk | CompletionAsk,
        param: str,
        prompts: Sequence[list[int]],
        echoes: Sequence[str],
    ) -> list[Order]:
        """Every answer to every prompt.

        Raises:
            ContextTooLong: a prompt leaves no room for an answer.
            InvalidRequest: too many answers, or a bias of a token that there is not.
        """
        if len(prompts) * ask.answers > ANSWERS_MAX:
            raise InvalidRequest(f"n: at most {ANSWERS_MAX} answers at once", param="n")
        orders = []
        for prompt, echo in zip(prompts, echoes, strict=True):
            room = self._room(param, prompt)
            wanted = room if ask.tokens_max is None else min(ask.tokens_max, room)
            for answer in range(ask.answers):
                chosen = sampling(ask, self._defaults, answer)
                self._check_ids("logit_bias", chosen.logit_bias)
                orders.append(Order(prompt=prompt, sampling=chosen, tokens_max=wanted, echo=echo))
        return orders

    def _room(self, param: str, prompt: Sequence[int]) -> int:
        if not prompt:
            raise InvalidRequest(f"{param}: it has no tokens", param=param)
        if len(prompt) >= self._context:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens, and this model's context is "
                f"{self._context}, the answer included",
                param=param,
            )
        return self._context - len(prompt)

    async def _answer(
        self, request: Request, kind: Kind, ask: ChatAsk | CompletionAsk, orders: list[Order]
    ) -> None:
        object_ = "chat.completion" if kind == "chat" else "text_completion"
        head: dict[str, object] = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{object_}.chunk" if kind == "chat" and ask.stream else object_,
            "created": wall_s(),
            "model": ask.model or self._model,
            "system_fingerprint": None,
        }
        shape = Shape(kind, self._text, scored=ask.alternatives is not None)
        with Answer(self._generator, self._text, self._eos, orders, ask.stops) as answer:
            if ask.stream:
                await self._stream(request, head, shape, answer, usage=ask.wants_usage, kind=kind)
                return
            pieces: list[list[Piece]] = [[] for _ in orders]
            async for piece in answer.pieces():
                pieces[piece.index].append(piece)
            choices = [shape.whole(_joined(parts)) for parts in pieces]
            self._tell(request, head | {"choices": choices, "usage": answer.usage})

    async def _stream(
        self,
        request: Request,
        head: dict[str, object],
        shape: Shape,
        answer: Answer,
        *,
        usage: bool,
        kind: Kind,
    ) -> None:
        opened: set[int] = set()
        try:
            async for piece in answer.pieces():
                events = []
                if not request.started:
                    request.start(200, EVENT_STREAM_HEADERS)
                if kind == "chat" and piece.index not in opened:
                    opened.add(piece.index)
                    events.append(_event(head | {"choices": [shape.opening(piece.index)]}))
                events.append(_event(head | {"choices": [shape.chunk(piece)]}))
                await request.write(b"".join(events))
        except SLLMError as error:
            if not request.started:
                raise
            await request.write(b"data: " + error_body(error) + b"\n\n")
            request.finish()
            return
        if usage:
            await request.write(_event(head | {"choices": [], "usage": answer.usage}))
        await request.write(DONE)
        request.finish()

    async def _embed(self, request: Request) -> None:
        ask = read(await request.body(), EmbeddingAsk)
        inputs = [await self._tokens("input", one) for one in texts("input", ask.input)]
        for tokens in inputs:
            self._room("input", tokens)
        data = []
        self._aside += 1
        try:
            for index, tokens in enumerate(inputs):
                vector = await self._beside_if(True, partial(self._vector, tokens))
                shown = _base64(vector) if ask.encoding_format == "base64" else vector
                data.append({"object": "embedding", "index": index, "embedding": shown})
        finally:
            self._aside -= 1
        count = sum(map(len, inputs))
        usage = {"prompt_tokens": count, "total_tokens": count}
        model = ask.model or self._model
        self._tell(request, {"object": "list", "data": data, "model": model, "usage": usage})

    def _vector(self, tokens: list[int]) -> list[float]:
        """Of length 1: the mean of the last hidden states."""
        self._weights.wait_all()
        model: PreTrainedModel = self._weights.model

        def compute() -> torch.Tensor:
            ids = torch.tensor([tokens], device=model.device)
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            return torch.nn.functional.normalize(states.float().mean(0), dim=0)

        vector: list[float] = self._generator.run_aside(compute).tolist()
        return vector

    async def _tokens(self, param: str, given: str | list[int]) -> list[int]:
        """A prompt's tokens.

        Raises:
            InvalidRequest: a number is not one of the vocabulary.
        """
        if isinstance(given, str):
            return await self._beside_if(len(given) > _LONG_CHARS, lambda: self._text.encode(given))
        self._check_ids(param, given)
        return given

    def _check_ids(self, param: str, given: Iterable[int]) -> None:
        table = cast(torch.nn.Embedding, self._weights.model.get_input_embeddings())
        vocabulary = table.weight.shape[0]
        if not all(0 <= token < vocabulary for token in given):
            raise InvalidRequest(f"{param}: token ids are below {vocabulary}", param=param)

    async def _beside_if(self, beside: bool, work: Callable[[], _T]) -> _T:
        """Long work in a thread, so that streams go on."""
        if not beside:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._beside, work)

    def _tell(self, request: Request, body: object) -> None:
        request.respond(200, _JSON, _encoder.encode(body))

    def _stats(self) -> BackendStats:
        generator = self._generator
        return BackendStats(
            running=generator.running + self._aside,
            queued=generator.queued,
            kv_hit_rate=generator.kv_hit_rate,
            progress=generator.steps + len(self._weights.arrived_s),
        )

    def _trace(self) -> Trace:
        return Trace(layers=self._weights.waits, chunks=self._weights.arrived_s)

    def _models(self) -> dict[str, object]:
        one = {"id": self._model, "object": "model", "created": 0, "owned_by": "transformers"}
        return {"object": "list", "data": [one]}


def _joined(parts: Sequence[Piece]) -> Piece:
    return Piece(
        index=parts[-1].index,
        text="".join(part.text for part in parts),
        tokens=[token for part in parts for token in part.tokens],
        finish_reason=parts[-1].finish_reason,
    )


def _event(body: dict[str, object]) -> bytes:
    return b"data: " + _encoder.encode(body) + b"\n\n"


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(array("f", vector).tobytes()).decode()
