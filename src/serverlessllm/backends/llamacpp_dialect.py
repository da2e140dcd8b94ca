"""How llama.cpp's server departs from the API: which requests pass, which are made of others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import msgspec
from msgspec import Raw

from serverlessllm.backends.dialect import (
    GENERATION,
    Ask,
    Composed,
    Engine,
    Operation,
    decode,
)
from serverlessllm.backends.llamacpp_chat import (
    CHATS,
    ChatAsk,
    MendedChat,
    RenderedChat,
    as_it_stands,
    check_text_only,
    without_tools,
)
from serverlessllm.backends.llamacpp_requests import Continued, takeable, without_nulls
from serverlessllm.backends.llamacpp_text import TOKENS_MAX, TextAsk, Texts
from serverlessllm.backends.llamacpp_tokens import detokenized, ranked, tokenized
from serverlessllm.backends.llamacpp_wire import COMPLETIONS, spells
from serverlessllm.backends.tools import toolset_of
from serverlessllm.openai.request.tools import TextAnswer
from serverlessllm.openai.rerank import RerankRequest
from serverlessllm.openai.tokenize import DetokenizeRequest, TokenizeRequest

_TOKENS = frozenset({Operation.TOKENIZE, Operation.DETOKENIZE})
_fields = msgspec.json.Decoder(dict[str, Raw])
_encoder = msgspec.json.Encoder()


class LlamaDialect:
    """Of one instance. It remembers what it learned of the model's vocabulary."""

    streams_usage = True

    def __init__(
        self, *, embeddings: bool, rerank: bool, scored_tokens_max: int, slots: int
    ) -> None:
        self.operations = _TOKENS | {Operation.RERANK} if rerank else _TOKENS | GENERATION
        if not embeddings:
            self.operations -= {Operation.EMBEDDINGS}
        self._scored_tokens_max = scored_tokens_max
        self._slots = slots
        self._spells: bool | None = None

    def translate(self, operation: Operation, body: bytes) -> Ask | Composed:
        """`backends.dialect.Dialect`."""
        match operation:
            case Operation.CHAT:
                return self._chat(body)
            case Operation.COMPLETIONS:
                return self._completion(body)
            case Operation.EMBEDDINGS:
                return Ask(operation, without_nulls(body))
            case Operation.TOKENIZE:
                ask = decode(body, TokenizeRequest)
                return partial(tokenized, ask, takeable(body) if ask.messages else body)
            case Operation.DETOKENIZE:
                return partial(detokenized, decode(body, DetokenizeRequest))
            case Operation.RERANK:
                return partial(ranked, decode(body, RerankRequest))

    def _completion(self, body: bytes) -> Ask | Composed:
        ask = decode(body, TextAsk)
        if not ask.plain:
            return Texts(ask, body, scored_tokens_max=self._scored_tokens_max, at_once=self._slots)
        if ask.max_tokens is None:
            fields = _fields.decode(body) | {"max_tokens": Raw(b"%d" % TOKENS_MAX)}
            body = _encoder.encode(fields)
        return Ask(COMPLETIONS, body)

    def _chat(self, body: bytes) -> Ask | Composed:
        if as_it_stands(body):
            return Ask(CHATS, body)
        check_text_only(body)
        body = takeable(body)
        ask = decode(body, ChatAsk)
        toolset = toolset_of(ask)
        if ask.tools and not toolset.tools:
            body = without_tools(body)
        if toolset.forced:
            return RenderedChat(ask, body)
        constrained = not isinstance(ask.response_format, TextAnswer | None)
        if toolset.tools or constrained:
            if self._spells is False:
                return RenderedChat(ask, body)
            if self._spells is None:
                return _Learning(self, ask, body)
        return self.passed(ask, body)

    def passed(self, ask: ChatAsk, body: bytes) -> Ask | Composed:
        """As the engine does it."""
        chat: Ask | Composed = Ask(CHATS, body)
        if ask.scores_only or (ask.n or 1) > 1:
            chat = MendedChat(ask, body, at_once=self._slots)
        if ask.continue_final_message and not ask.stream:
            chat = Continued(chat, body)
        return chat

    async def learn(self, engine: Engine) -> bool:
        """Whether the engine's own constraints hold with this model's vocabulary."""
        if self._spells is None:
            self._spells = await spells(engine)
        return self._spells


class _Learning:
    """The first chat with a constraint: as the engine does it, if that holds."""

    def __init__(self, dialect: LlamaDialect, ask: ChatAsk, body: bytes) -> None:
        self._dialect = dialect
        self._ask = ask
        self._body = body

    async def __call__(self, engine: Engine) -> AsyncIterator[bytes]:
        """`backends.dialect.Composed`."""
        holds = await self._dialect.learn(engine)
        ask, body = self._ask, self._body
        chosen = self._dialect.passed(ask, body) if holds else RenderedChat(ask, body)
        if not isinstance(chosen, Ask):
            async for piece in chosen(engine):
                yield piece
        elif not ask.stream:
            yield await engine.ask(chosen.path, chosen.body)
        else:
            async for data in engine.stream(chosen.path, chosen.body):
                yield b"data: " + data + b"\n\n"
            yield b"data: [DONE]\n\n"
