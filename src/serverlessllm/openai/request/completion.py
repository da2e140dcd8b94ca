"""`POST /v1/completions`."""

from __future__ import annotations

import msgspec

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request.fields import (
    AtLeastOne,
    Count,
    ParsedRequest,
    SampledFields,
    at_least,
    at_most,
    check_sampled,
    parsed,
)
from serverlessllm.openai.request.prompts import Prompts, check_texts
from serverlessllm.openai.request.read import read_request
from serverlessllm.openai.settings import RequestLimits


class CompletionRequest(SampledFields, frozen=True, kw_only=True):
    """A text that the model shall continue."""

    prompt: Prompts
    """A text, several, token ids, or several arrays of them."""
    max_tokens: Count | None = None
    """The most tokens that one answer may have; 0 only together with `echo`."""
    best_of: AtLeastOne | None = None
    """Answers made, of which the likeliest `n` are given; not with `stream`."""
    logprobs: Count | None = None
    """Likeliest alternatives told for each token, with log probabilities."""
    echo: bool | None = None
    """Repeat the prompt before the answer."""
    suffix: str | None = None
    """What comes after the answer, for models that fill in."""


_decoder = msgspec.json.Decoder(CompletionRequest)


def parse_completion(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check a completion; raises as `parse_chat`."""
    completion = read_request(_decoder, body, limits)
    prompts = check_texts("prompt", completion.prompt, limits)
    check_sampled(completion, limits)
    answers = completion.n or 1
    if completion.best_of is not None:
        answers = _check_best_of(completion, completion.best_of, limits)
    if completion.logprobs is not None:
        at_most("logprobs", completion.logprobs, limits.top_logprobs_max)
    tokens_max = completion.max_tokens
    if tokens_max is not None:
        at_most("max_tokens", tokens_max, limits.max_tokens_max)
        if not tokens_max and not completion.echo:
            at_least("max_tokens", tokens_max, 1, ", or 0 together with echo=true")
        tokens_max *= answers * prompts
    return parsed(completion, stream=completion.stream is True, answer_tokens_max=tokens_max)


def _check_best_of(completion: CompletionRequest, best_of: int, limits: RequestLimits) -> int:
    at_most("best_of", best_of, limits.n_max)
    at_least("best_of", best_of, completion.n or 1, " (it is n)")
    if best_of > 1 and completion.stream:
        raise InvalidRequest("best_of: only 1 together with stream=true", param="best_of")
    return best_of
