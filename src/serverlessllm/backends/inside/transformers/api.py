"""The routes of the engine's server."""

from __future__ import annotations

import base64
import uuid
from array import array
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from serverlessllm.backends.base import BackendStats
from serverlessllm.backends.inside.transformers.answers import (
    Answer,
    Echo,
    Kind,
    Order,
    Piece,
    Shape,
    joined,
    likeliest,
)
from serverlessllm.backends.inside.transformers.arrivals import Wait
from serverlessllm.backends.inside.transformers.asks import (
    ANSWERS_MAX,
    INPUTS_MAX,
    ChatAsk,
    CompletionAsk,
    Defaults,
    EmbeddingAsk,
    TokenizeAsk,
    read,
    sampling,
    schema,
    texts,
)
from serverlessllm.backends.inside.transformers.constraints import Grammars
from serverlessllm.backends.inside.transformers.generation import Generator
from serverlessllm.backends.inside.transformers.messages import templated
from serverlessllm.backends.inside.transformers.reading import Reader
from serverlessllm.backends.inside.transformers.text import Text
from serverlessllm.backends.inside.transformers.weights import Weights
from serverlessllm.backends.tools import calls_schema
from serverlessllm.core.clock import wall_s
from serverlessllm.core.errors import InvalidRequest, MethodNotAllowed, RouteNotFound, SLLMError
from serverlessllm.edge.server import Request
from serverlessllm.openai.errors import error_body
from serverlessllm.openai.sse import DONE, EVENT_STREAM_HEADERS
from serverlessllm.openai.tokenize import DetokenizeRequest

_JSON = (("content-type", "application/json"),)
_encoder = msgspec.json.Encoder()


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
        self._grammars = Grammars(text, sorted(eos))
        self._reader = Reader(text, weights, generator, context)
        self._routes: dict[tuple[str, str], Callable[[Request], object]] = {
            ("GET", "/health"): lambda request: request.respond(200, _JSON, b'{"status":"ok"}'),
            ("GET", "/stats"): lambda request: self._tell(request, self._stats()),
            ("GET", "/trace"): lambda request: self._tell(request, self._trace()),
            ("GET", "/v1/models"): lambda request: self._tell(request, self._models()),
        }
        self._posts: dict[str, Callable[[Request], Awaitable[None]]] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._complete,
            "/v1/tokenize": self._tokenize,
            "/v1/detokenize": self._detokenize,
        }
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
        toolset = ask.toolset
        prompt = await self._reader.chat(
            templated(ask.messages),
            generation_prompt=ask.add_generation_prompt and not ask.continue_final_message,
            continue_last=ask.continue_final_message,
            tools=toolset.told(),
        )
        form, param = schema(ask), "response_format"
        if toolset.forced:
            form, param = calls_schema(toolset.tools, several=toolset.several), "tools"
        wanted = self._orders(ask, "messages", [prompt], [None], ask.answers)
        orders = [msgspec.structs.replace(order, toolset=toolset) for order in wanted]
        await self._answer(request, "chat", ask, await self._held_to(form, param, orders))

    async def _complete(self, request: Request) -> None:
        ask = read(await request.body(), CompletionAsk)
        given = texts("prompt", ask.prompt, ANSWERS_MAX)
        if ask.suffix and isinstance(ask.prompt, str):
            prompts = [self._text.encode_gap(ask.prompt, ask.suffix)]
        else:
            prompts = [await self._reader.tokens("prompt", one) for one in given]
        echoes: list[Echo | None] = [None] * len(given)
        if ask.echo:
            for place, (one, tokens) in enumerate(zip(given, prompts, strict=True)):
                self._reader.room("prompt", tokens)
                text = one if isinstance(one, str) else self._text.decode(one)
                echoes[place] = Echo(text, await self._reader.scored(tokens, ask.logprobs))
        orders = self._orders(ask, "prompt", prompts, echoes, ask.made)
        orders = await self._held_to(schema(ask), "response_format", orders)
        await self._answer(request, "text", ask, orders)

    async def _held_to(
        self, form: dict[str, object] | None, param: str, orders: list[Order]
    ) -> list[Order]:
        """The orders, each to be JSON of this schema, if there is one."""
        if form is None:
            return orders
        constraints = await self._reader.beside(
            lambda: self._grammars.constraint(form, param=param, answers=len(orders))
        )
        return [
            msgspec.structs.replace(order, constraint=constraint)
            for order, constraint in zip(orders, constraints, strict=True)
        ]

    def _orders(
        self,
        ask: ChatAsk | CompletionAsk,
        param: str,
        prompts: Sequence[list[int]],
        echoes: Sequence[Echo | None],
        answers: int,
    ) -> list[Order]:
        """Every answer to every prompt.

        Raises:
            ContextTooLong: a prompt leaves no room for an answer.
            InvalidRequest: too many answers, or a bias of a token that there is not.
        """
        if len(prompts) * answers > ANSWERS_MAX:
            raise InvalidRequest(f"n: at most {ANSWERS_MAX} answers at once", param="n")
        orders = []
        for prompt, echo in zip(prompts, echoes, strict=True):
            room = self._reader.room(param, prompt)
            wanted = room if ask.tokens_max is None else min(ask.tokens_max, room)
            for answer in range(answers):
                chosen = sampling(ask, self._defaults, answer)
                self._reader.check_ids("logit_bias", chosen.logit_bias)
                orders.append(Order(prompt=prompt, sampling=chosen, tokens_max=wanted, echo=echo))
        return orders

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
            whole = [joined(parts) for parts in pieces]
            if isinstance(ask, CompletionAsk) and ask.made > ask.answers:
                whole = likeliest(whole, ask.made, ask.answers)
            choices = [shape.whole(piece) for piece in whole]
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
        given = texts("input", ask.input, INPUTS_MAX)
        inputs = [await self._reader.tokens("input", one) for one in given]
        for tokens in inputs:
            self._reader.room("input", tokens)
        data = []
        for index, tokens in enumerate(inputs):
            vector = await self._reader.vector(tokens, ask.dimensions)
            shown = _base64(vector) if ask.encoding_format == "base64" else vector
            data.append({"object": "embedding", "index": index, "embedding": shown})
        count = sum(map(len, inputs))
        usage = {"prompt_tokens": count, "total_tokens": count}
        model = ask.model or self._model
        self._tell(request, {"object": "list", "data": data, "model": model, "usage": usage})

    async def _tokenize(self, request: Request) -> None:
        ask = read(await request.body(), TokenizeAsk)
        self._tell(request, await self._reader.tokenized(ask))

    async def _detokenize(self, request: Request) -> None:
        ask = read(await request.body(), DetokenizeRequest)
        self._tell(request, self._reader.detokenized(ask))

    def _tell(self, request: Request, body: object) -> None:
        request.respond(200, _JSON, _encoder.encode(body))

    def _stats(self) -> BackendStats:
        generator = self._generator
        return BackendStats(
            running=generator.running + self._reader.working,
            queued=generator.queued,
            kv_hit_rate=generator.kv_hit_rate,
            progress=generator.steps + len(self._weights.arrived_s),
        )

    def _trace(self) -> Trace:
        return Trace(layers=self._weights.waits, chunks=self._weights.arrived_s)

    def _models(self) -> dict[str, object]:
        one = {"id": self._model, "object": "model", "created": 0, "owned_by": "transformers"}
        return {"object": "list", "data": [one]}


def _event(body: dict[str, object]) -> bytes:
    return b"data: " + _encoder.encode(body) + b"\n\n"


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(array("f", vector).tobytes()).decode()
