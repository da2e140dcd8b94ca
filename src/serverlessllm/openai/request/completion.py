"""`POST /v1/completions`."""

from __future__ import annotations

from serverlessllm.openai.request.fields import AtLeastOne, Count, SampledFields
from serverlessllm.openai.request.prompts import Prompts


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
