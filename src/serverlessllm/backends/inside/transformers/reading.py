"""Texts as the model reads them, and what it makes of them without answering."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import torch

from serverlessllm.backends.inside.transformers.asks import TokenizeAsk
from serverlessllm.backends.inside.transformers.generation import Generator
from serverlessllm.backends.inside.transformers.messages import templated
from serverlessllm.backends.inside.transformers.sampling import Score
from serverlessllm.backends.inside.transformers.scoring import embedding, prompt_scores
from serverlessllm.backends.inside.transformers.text import Message, Text
from serverlessllm.backends.inside.transformers.weights import Weights
from serverlessllm.backends.tools import ToolFields, toolset_of
from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.errors import ContextTooLong
from serverlessllm.openai.tokenize import Detokenized, DetokenizeRequest, Tokenized

_LONG_CHARS = 16_384
"""A longer text is made into tokens beside the event loop."""
_T = TypeVar("_T")


class Reader:
    """Tokens, their scores, embeddings; what takes long is done in a thread of its own."""

    def __init__(self, text: Text, weights: Weights, generator: Generator, context: int) -> None:
        """`context`: tokens of the longest prompt and answer together."""
        self.working = 0
        """Requests that the engine computes for, and that are no generation."""
        self._text = text
        self._weights = weights
        self._generator = generator
        self._context = context
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="beside")

    async def beside(self, work: Callable[[], _T]) -> _T:
        """Long work in a thread, so that streams go on."""
        return await asyncio.get_running_loop().run_in_executor(self._beside, work)

    async def tokens(
        self, param: str, given: str | list[int], *, special: bool = True
    ) -> list[int]:
        """A prompt's tokens.

        Raises:
            InvalidRequest: a number is not one of the vocabulary.
        """
        if isinstance(given, str):
            if len(given) <= _LONG_CHARS:
                return self._text.encode(given, special=special)
            return await self.beside(lambda: self._text.encode(given, special=special))
        self.check_ids(param, given)
        return given

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        continue_last: bool,
        tools: Sequence[object],
        special: bool = False,
    ) -> list[int]:
        """A chat's tokens; raises as `Text.encode_chat`."""

        def encode() -> list[int]:
            return self._text.encode_chat(
                messages,
                generation_prompt=generation_prompt,
                continue_last=continue_last,
                tools=tools,
                special=special,
            )

        size = sum(len(message.content) for message in messages)
        return encode() if size <= _LONG_CHARS else await self.beside(encode)

    def check_ids(self, param: str, given: Iterable[int]) -> None:
        """Raise `InvalidRequest` for a token that there is not."""
        table = cast(torch.nn.Embedding, self._weights.model.get_input_embeddings())
        vocabulary = table.weight.shape[0]
        if not all(0 <= token < vocabulary for token in given):
            raise InvalidRequest(f"{param}: token ids are below {vocabulary}", param=param)

    def room(self, param: str, prompt: Sequence[int]) -> int:
        """Tokens that an answer may have.

        Raises:
            ContextTooLong: none.
            InvalidRequest: the prompt is empty.
        """
        if not prompt:
            raise InvalidRequest(f"{param}: it has no tokens", param=param)
        if len(prompt) >= self._context:
            raise ContextTooLong(
                f"the prompt has {len(prompt)} tokens, and this model's context is "
                f"{self._context}, the answer included",
                param=param,
            )
        return self._context - len(prompt)

    async def scored(
        self, tokens: list[int], alternatives: int | None
    ) -> list[tuple[int, Score | None]]:
        """A prompt's tokens with their scores, if `alternatives` to them are asked for."""
        if alternatives is None:
            return []

        def compute() -> list[Score | None]:
            self._weights.wait_all()
            model = self._weights.model
            return self._generator.run_aside(lambda: prompt_scores(model, tokens, alternatives))

        with self._at_work():
            scores = await self.beside(compute)
        return list(zip(tokens, scores, strict=True))

    async def vector(self, tokens: list[int], width: int | None) -> list[float]:
        """A text's embedding, of length 1."""

        def compute() -> list[float]:
            self._weights.wait_all()
            model = self._weights.model
            made = self._generator.run_aside(lambda: embedding(model, tokens, width))
            vector: list[float] = made.tolist()
            return vector

        with self._at_work():
            return await self.beside(compute)

    async def tokenized(self, ask: TokenizeAsk) -> Tokenized:
        """`POST /v1/tokenize`."""
        if ask.prompt is not None:
            special = True if ask.add_special_tokens is None else ask.add_special_tokens
            tokens = await self.tokens("prompt", ask.prompt, special=special)
        else:
            tokens = await self.chat(
                templated(ask.messages or ()),
                generation_prompt=ask.add_generation_prompt and not ask.continue_final_message,
                continue_last=ask.continue_final_message,
                tools=toolset_of(ToolFields(tools=ask.tools)).told(),
                special=bool(ask.add_special_tokens),
            )
        spelled = None
        if ask.return_token_strs:
            spelled = [self._text.token(token)[0] for token in tokens]
        return Tokenized(
            count=len(tokens), max_model_len=self._context, tokens=tokens, token_strs=spelled
        )

    def detokenized(self, ask: DetokenizeRequest) -> Detokenized:
        """`POST /v1/detokenize`."""
        self.check_ids("tokens", ask.tokens)
        return Detokenized(prompt=self._text.decode(ask.tokens, special=True))

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1
