"""The fake engine's process: an OpenAI server that computes nothing.

`python -m serverlessllm.backends.inside.fake ADDRESS MODEL OPTIONS_JSON [IDX]`. The token of a
given place in the answer to a given prompt is always the same, so a replay can be checked.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgspec

from serverlessllm.backends.base import READY_FD, BackendStats
from serverlessllm.backends.fake import FakeOptions
from serverlessllm.backends.inside.fake_answers import Answer, Kind
from serverlessllm.backends.inside.fake_asks import (
    Ask,
    ChatAsk,
    CompletionAsk,
    EmbeddingAsk,
    planned,
    read,
    texts,
)
from serverlessllm.backends.inside.fake_layers import Layers
from serverlessllm.backends.inside.fake_words import (
    EMBEDDING_WIDTH,
    Vocabulary,
    base64_of,
    embedding_of,
    score_of,
)
from serverlessllm.core.clock import SystemClock, wall_s
from serverlessllm.core.errors import MethodNotAllowed, RouteNotFound
from serverlessllm.core.ids import Address
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.openai.errors import render_error
from serverlessllm.openai.rerank import RerankRequest, reranked
from serverlessllm.openai.sse import DONE, EVENT_STREAM_HEADERS
from serverlessllm.openai.tokenize import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)

_PROMPTS_REMEMBERED = 256
_CONTEXT = 1 << 20
_JSON = (("content-type", "application/json"),)
_encoder = msgspec.json.Encoder()


class FakeServer:
    """Routes, slots and figures."""

    def __init__(self, model: str, options: FakeOptions, layers: Layers | None = None) -> None:
        self._model = model
        self._options = options
        self._layers = layers
        self._slots = asyncio.Semaphore(options.slots)
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._running = self._queued = self._progress = self._answers = 0
        self._prompt_tokens = self._cached_tokens = 0
        self._vocabulary = Vocabulary()
        self._posts: dict[str, Callable[[Request], Awaitable[None]]] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._complete,
            "/v1/embeddings": self._embed,
            "/v1/tokenize": self._tokenize,
            "/v1/detokenize": self._detokenize,
            "/v1/rerank": self._rerank,
        }

    async def handle(self, request: Request) -> None:
        """One request."""
        route = (request.method, request.path)
        if request.method == "POST" and request.path in self._posts:
            await self._posts[request.path](request)
        elif route == ("GET", "/v1/models"):
            one = {"id": self._model, "object": "model", "created": 0, "owned_by": "fake"}
            _tell(request, {"object": "list", "data": [one]})
        elif route == ("GET", "/health"):
            _tell(request, {"status": "ok"})
        elif route == ("GET", "/stats"):
            _tell(request, self._stats())
        elif route == ("GET", "/layers") and self._layers is not None:
            _tell(request, self._layers.told())
        elif request.path.startswith("/v1/") and request.method not in {"GET", "POST"}:
            raise MethodNotAllowed(f"{request.method} is not a method of {request.path}")
        else:
            raise RouteNotFound(f"no route {request.path}")

    async def _chat(self, request: Request) -> None:
        ask = await read(request, ChatAsk)
        call, form = ask.call(), ask.form()
        said = form if call is None else call.arguments
        text = None if said is None else _encoder.encode(said).decode()
        answers = [
            Answer(
                index,
                "chat",
                planned(ask, ask.salted(ask.prompt, index), text, self._options.tokens),
                alternatives=(ask.top_logprobs or 0) if ask.logprobs else None,
                call=None if call is None else call.name,
            )
            for index in range(ask.n or 1)
        ]
        await self._answer(request, "chat", ask, [ask.prompt], answers)

    async def _complete(self, request: Request) -> None:
        ask = await read(request, CompletionAsk)
        prompts = texts(ask.prompt, self._vocabulary.decode)
        answers: list[Answer] = []
        for prompt in prompts:
            echo = self._vocabulary.words(prompt) if ask.echo else []
            for number in range(ask.n or 1):
                plan = planned(ask, ask.salted(prompt, number), None, self._options.tokens)
                answers.append(
                    Answer(len(answers), "text", plan, alternatives=ask.logprobs, echo=echo)
                )
        await self._answer(request, "text", ask, prompts, answers)

    async def _embed(self, request: Request) -> None:
        ask = await read(request, EmbeddingAsk)
        inputs = texts(ask.input, self._vocabulary.decode)
        data = []
        for index, text in enumerate(inputs):
            vector = embedding_of(text, ask.dimensions or EMBEDDING_WIDTH)
            shown = base64_of(vector) if ask.encoding_format == "base64" else vector
            data.append({"object": "embedding", "index": index, "embedding": shown})
        tokens = sum(len(text.split()) for text in inputs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        _tell(request, {"object": "list", "data": data, "model": self._model, "usage": usage})

    async def _tokenize(self, request: Request) -> None:
        ask = await read(request, TokenizeRequest)
        text = ask.prompt
        if text is None:
            text = (await read(request, ChatAsk)).prompt
        tokens = self._vocabulary.encode(text)
        words = self._vocabulary.words(text) if ask.return_token_strs else None
        answer = Tokenized(
            count=len(tokens), max_model_len=_CONTEXT, tokens=tokens, token_strs=words
        )
        _tell(request, answer)

    async def _detokenize(self, request: Request) -> None:
        ask = await read(request, DetokenizeRequest)
        _tell(request, Detokenized(prompt=self._vocabulary.decode(ask.tokens)))

    async def _rerank(self, request: Request) -> None:
        ask = await read(request, RerankRequest)
        scores = [score_of(ask.query, text) for text in ask.texts]
        tokens = len(" ".join((ask.query, *ask.texts)).split())
        self._answers += 1
        _tell(request, reranked(ask, scores, name=f"fake-{self._answers}", prompt_tokens=tokens))

    def _stats(self) -> BackendStats:
        seen = self._prompt_tokens
        return BackendStats(
            running=self._running,
            queued=self._queued,
            kv_hit_rate=self._cached_tokens / seen if seen else 0.0,
            progress=self._progress,
        )

    async def _answer(
        self, request: Request, kind: Kind, ask: Ask, prompts: list[str], answers: list[Answer]
    ) -> None:
        if self._options.flood_bytes:
            os.write(1, b"fake " * (self._options.flood_bytes // 5))
        self._queued += 1
        try:
            await self._slots.acquire()
        finally:
            self._queued -= 1
        self._running += 1
        try:
            await self._generate(request, kind, ask, prompts, answers)
        finally:
            self._running -= 1
            self._slots.release()

    async def _generate(
        self, request: Request, kind: Kind, ask: Ask, prompts: list[str], answers: list[Answer]
    ) -> None:
        self._answers += 1
        object_ = "chat.completion" if kind == "chat" else "text_completion"
        head: dict[str, object] = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-fake-{self._answers}",
            "object": f"{object_}.chunk" if kind == "chat" and ask.stream else object_,
            "created": wall_s(),
            "model": self._model,
            "system_fingerprint": "fake",
        }
        usage = self._usage(prompts, sum(answer.plan.count for answer in answers))
        if not ask.stream:
            for answer in answers:
                async for _ in self._tokens(request, answer):
                    pass
            choices = [answer.whole() for answer in answers]
            _tell(request, head | {"choices": choices, "usage": usage})
            return
        request.start(200, EVENT_STREAM_HEADERS)
        for answer in answers:
            if kind == "chat" or answer.echo:
                await _event(request, head, answer.opening())
            async for number in self._tokens(request, answer):
                await _event(request, head, answer.chunk(number))
            await _event(request, head, answer.closing())
        if ask.wants_usage:
            body = head | {"choices": [], "usage": usage}
            await request.write(b"data: " + _encoder.encode(body) + b"\n\n")
        await request.write(DONE)
        request.finish()

    async def _tokens(self, request: Request, answer: Answer) -> AsyncIterator[int]:
        """The numbers of the tokens, each when its time has come, or the fault that was asked."""
        options = self._options
        for number in range(answer.plan.count):
            await asyncio.sleep(options.token_s if number else options.first_token_s)
            if number == options.crash_at_token:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == options.hang_at_token:
                os.kill(os.getpid(), signal.SIGSTOP)
            if number == options.nonsense_at_token:
                if request.started:
                    await request.write(b'data: {"choices": [{"ind')
                request.abort()
                raise asyncio.CancelledError
            layers = self._layers
            answer.tokens.append(
                answer.plan.token(number) if layers is None else await layers.token(number)
            )
            self._progress += 1
            yield number

    def _usage(self, prompts: list[str], completion_tokens: int) -> dict[str, object]:
        """Counts in words; a prompt's longest beginning that was seen before counts as cached."""
        count = cached = 0
        for prompt in prompts:
            words = prompt.split()
            count += len(words)
            cached += self._cached(words)
        self._prompt_tokens += count
        self._cached_tokens += cached
        return {
            "prompt_tokens": count,
            "completion_tokens": completion_tokens,
            "total_tokens": count + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _cached(self, words: list[str]) -> int:
        cached = 0
        for length in _prefix_lengths(len(words)):
            beginning = " ".join(words[:length])
            if beginning in self._seen:
                cached = length
            self._seen[beginning] = None
            self._seen.move_to_end(beginning)
        while len(self._seen) > _PROMPTS_REMEMBERED:
            self._seen.popitem(last=False)
        return cached


def _prefix_lengths(words: int) -> Iterator[int]:
    """Powers of two, and the whole: enough to recognise a shared beginning."""
    length = 1
    while length < words:
        yield length
        length *= 2
    if words:
        yield words


async def _event(request: Request, head: dict[str, object], choice: dict[str, object]) -> None:
    body = _encoder.encode(head | {"choices": [choice]})
    await request.write(b"data: " + body + b"\n\n")


def _tell(request: Request, body: object) -> None:
    request.respond(200, _JSON, _encoder.encode(body))


async def serve(
    address: Address, model: str, options: FakeOptions, index_path: Path | None = None
) -> None:
    """Become ready after `start_s`, tell, and serve until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await asyncio.sleep(options.start_s)
    if options.fail_start:
        sys.exit("fake: asked to fail its start")
    layers = Layers(index_path) if options.layered and index_path is not None else None
    fake = FakeServer(model, options, layers)
    server = EdgeServer(fake.handle, EdgeSettings(), render_error, SystemClock())
    await server.start(address)
    ready = os.environ.pop(READY_FD, None)
    if ready is not None:
        os.write(int(ready), b"\n")
        os.close(int(ready))
    await ended.wait()
    await server.close()


def preload() -> None:
    """In a template: this module's own imports are all there is."""


def main(argument: str) -> None:
    """In a fork: be the server that a JSON list of the command's words describes."""
    run(msgspec.json.decode(argument, type=list[str]))


def run(words: list[str]) -> None:
    """Be the server that the command's words describe."""
    address, model, options, *index = words
    asyncio.run(
        serve(
            Address(address),
            model,
            msgspec.json.decode(options, type=FakeOptions),
            Path(index[0]) if index else None,
        )
    )


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        run(sys.argv[1:])
