"""The fake engine's process: an OpenAI server that computes nothing.

`python -m serverlessllm.backends.inside.fake ADDRESS MODEL OPTIONS_JSON [IDX]`. The token of a
given place in the answer to a given prompt is always the same, so a replay can be checked.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from serverlessllm.backends.base import READY_FD, BackendStats
from serverlessllm.backends.fake import FakeOptions
from serverlessllm.backends.inside.fake_layers import Layers
from serverlessllm.core.clock import SystemClock, wall_s
from serverlessllm.core.errors import InvalidRequest, MethodNotAllowed, RouteNotFound
from serverlessllm.core.ids import Address
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.openai.errors import render_error
from serverlessllm.openai.sse import DONE, EVENT_STREAM_HEADERS

WORDS = (
    *("a", "the", "one", "model", "answers", "with", "words", "that", "nobody", "computed"),
    *("which", "come", "at", "the", "same", "place", "each", "time", "and", "mean", "nothing"),
)
_PROMPTS_REMEMBERED = 256
_EMBEDDING_WIDTH = 8
_JSON = (("content-type", "application/json"),)
_encoder = msgspec.json.Encoder()


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: object = None


class _Ask(msgspec.Struct, frozen=True):
    """What chat and completions have in common."""

    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None

    @property
    def tokens_max(self) -> int | None:
        asked = self.max_completion_tokens
        return self.max_tokens if asked is None else asked


class _Chat(_Ask, frozen=True, kw_only=True):
    messages: Annotated[tuple[_Message, ...], msgspec.Meta(min_length=1)]
    logprobs: bool = False

    @property
    def prompt(self) -> str:
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages)


class _Completion(_Ask, frozen=True, kw_only=True):
    prompt: str
    logprobs: int | None = None


class _Embedding(msgspec.Struct, frozen=True):
    input: str | Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer that is being made."""

    kind: Literal["chat", "text"]
    head: dict[str, object]
    count: int
    finish_reason: str
    prompt: str
    logprobs: bool
    tokens: list[str]
    """So far."""

    def pieces(self, number: int) -> dict[str, object]:
        """The choice of one streamed chunk."""
        token = self.tokens[number]
        choice: dict[str, object] = {"index": 0, "finish_reason": None}
        if self.kind == "chat":
            choice["delta"] = {"content": token}
        else:
            choice["text"] = token
        if self.logprobs:
            choice["logprobs"] = self.scores(range(number, number + 1))
        return choice

    def whole(self) -> dict[str, object]:
        """The choice of an answer that is not streamed."""
        text = "".join(self.tokens)
        choice: dict[str, object] = {"index": 0, "finish_reason": self.finish_reason}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self.scores(range(self.count)) if self.logprobs else None
        return choice

    def scores(self, numbers: range) -> dict[str, object]:
        """Log probabilities in the API's two shapes: every token was certain."""
        tokens = [self.tokens[number] for number in numbers]
        if self.kind == "chat":
            content = [
                {"token": t, "logprob": 0.0, "bytes": list(t.encode()), "top_logprobs": []}
                for t in tokens
            ]
            return {"content": content, "refusal": None}
        return {"tokens": tokens, "token_logprobs": [0.0] * len(tokens), "top_logprobs": None}


def token_at(prompt: str, number: int) -> str:
    """The token at this place of the answer to this prompt."""
    word = WORDS[zlib.crc32(f"{number} {prompt}".encode()) % len(WORDS)]
    return word if number == 0 else f" {word}"


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

    async def handle(self, request: Request) -> None:
        """One request."""
        route = (request.method, request.path)
        if route == ("POST", "/v1/chat/completions"):
            chat = await _read(request, _Chat)
            await self._answer(request, "chat", chat, chat.prompt, chat.logprobs)
        elif route == ("POST", "/v1/completions"):
            text = await _read(request, _Completion)
            await self._answer(request, "text", text, text.prompt, text.logprobs is not None)
        elif route == ("POST", "/v1/embeddings"):
            request.respond(200, _JSON, self._embed(await _read(request, _Embedding)))
        elif route == ("GET", "/v1/models"):
            data = [{"id": self._model, "object": "model", "created": 0, "owned_by": "fake"}]
            request.respond(200, _JSON, _encoder.encode({"object": "list", "data": data}))
        elif route == ("GET", "/health"):
            request.respond(200, _JSON, b'{"status":"ok"}')
        elif route == ("GET", "/stats"):
            request.respond(200, _JSON, _encoder.encode(self._stats()))
        elif route == ("GET", "/layers") and self._layers is not None:
            request.respond(200, _JSON, _encoder.encode(self._layers.told()))
        elif request.path.startswith("/v1/") and request.method not in {"GET", "POST"}:
            raise MethodNotAllowed(f"{request.method} is not a method of {request.path}")
        else:
            raise RouteNotFound(f"no route {request.path}")

    def _stats(self) -> BackendStats:
        seen = self._prompt_tokens
        return BackendStats(
            running=self._running,
            queued=self._queued,
            kv_hit_rate=self._cached_tokens / seen if seen else 0.0,
            progress=self._progress,
        )

    async def _answer(
        self,
        request: Request,
        kind: Literal["chat", "text"],
        ask: _Ask,
        prompt: str,
        logprobs: bool,
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
            await self._generate(request, kind, ask, prompt, logprobs)
        finally:
            self._running -= 1
            self._slots.release()

    async def _generate(
        self,
        request: Request,
        kind: Literal["chat", "text"],
        ask: _Ask,
        prompt: str,
        logprobs: bool,
    ) -> None:
        self._answers += 1
        count = self._options.tokens if ask.tokens_max is None else ask.tokens_max
        object_ = "chat.completion" if kind == "chat" else "text_completion"
        answer = _Answer(
            kind=kind,
            head={
                "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-fake-{self._answers}",
                "object": f"{object_}.chunk" if kind == "chat" and ask.stream else object_,
                "created": wall_s(),
                "model": self._model,
                "system_fingerprint": "fake",
            },
            count=min(count, self._options.tokens),
            finish_reason="length" if count < self._options.tokens else "stop",
            prompt=prompt,
            logprobs=logprobs,
            tokens=[],
        )
        usage = self._usage(prompt, answer.count)
        if not ask.stream:
            async for _ in self._tokens(request, answer):
                pass
            body = answer.head | {"choices": [answer.whole()], "usage": usage}
            request.respond(200, _JSON, _encoder.encode(body))
            return
        request.start(200, EVENT_STREAM_HEADERS)
        if kind == "chat":
            role = {"role": "assistant", "content": "", "refusal": None}
            await _event(request, answer, {"index": 0, "delta": role, "finish_reason": None})
        async for number in self._tokens(request, answer):
            await _event(request, answer, answer.pieces(number))
        last: dict[str, object] = {"delta": {}} if kind == "chat" else {"text": ""}
        await _event(request, answer, {"index": 0, "finish_reason": answer.finish_reason} | last)
        if ask.stream_options is not None and ask.stream_options.include_usage:
            body = answer.head | {"choices": [], "usage": usage}
            await request.write(b"data: " + _encoder.encode(body) + b"\n\n")
        await request.write(DONE)
        request.finish()

    async def _tokens(self, request: Request, answer: _Answer) -> AsyncIterator[int]:
        """The numbers of the tokens, each when its time has come, or the fault that was asked."""
        options = self._options
        for number in range(answer.count):
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
                token_at(answer.prompt, number) if layers is None else await layers.token(number)
            )
            self._progress += 1
            yield number

    def _usage(self, prompt: str, completion_tokens: int) -> dict[str, object]:
        """Counts in words; a prompt's longest beginning that was seen before counts as cached."""
        words = prompt.split()
        cached = 0
        for length in _prefix_lengths(len(words)):
            beginning = " ".join(words[:length])
            if beginning in self._seen:
                cached = length
            self._seen[beginning] = None
            self._seen.move_to_end(beginning)
        while len(self._seen) > _PROMPTS_REMEMBERED:
            self._seen.popitem(last=False)
        self._prompt_tokens += len(words)
        self._cached_tokens += cached
        return {
            "prompt_tokens": len(words),
            "completion_tokens": completion_tokens,
            "total_tokens": len(words) + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _embed(self, ask: _Embedding) -> bytes:
        inputs = (ask.input,) if isinstance(ask.input, str) else ask.input
        data = [
            {"object": "embedding", "index": index, "embedding": embedding_of(text)}
            for index, text in enumerate(inputs)
        ]
        tokens = sum(len(text.split()) for text in inputs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        body = {"object": "list", "data": data, "model": self._model, "usage": usage}
        return _encoder.encode(body)


def embedding_of(text: str) -> list[float]:
    """A unit vector that depends on the text alone."""
    raw = [zlib.crc32(f"{axis} {text}".encode()) / 2**31 - 1 for axis in range(_EMBEDDING_WIDTH)]
    norm = sum(value * value for value in raw) ** 0.5
    return [value / norm for value in raw]


def _prefix_lengths(words: int) -> Iterator[int]:
    """Powers of two, and the whole: enough to recognise a shared beginning."""
    length = 1
    while length < words:
        yield length
        length *= 2
    if words:
        yield words


async def _event(request: Request, answer: _Answer, choice: dict[str, object]) -> None:
    body = _encoder.encode(answer.head | {"choices": [choice]})
    await request.write(b"data: " + body + b"\n\n")


_Body = TypeVar("_Body", _Chat, _Completion, _Embedding)


async def _read(request: Request, type_: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(await request.body(), type=type_)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


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
