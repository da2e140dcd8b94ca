"""Bounds that are settings, told in the schema beside those that the types say themselves."""

from __future__ import annotations

import msgspec

from serverlessllm.openai.document.dialects import MessageRequest, PromptToCount, ResponseRequest
from serverlessllm.openai.request import ChatRequest, CompletionRequest, EmbeddingsRequest
from serverlessllm.openai.request.fields import SampledFields
from serverlessllm.openai.settings import RequestLimits


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """A bound on one field; each keyword counts for the JSON type that it belongs to."""

    maximum: int | None = None
    items_max: int | None = None
    chars_max: int | None = None
    properties_max: int | None = None


def bounds(kind: type[msgspec.Struct], limits: RequestLimits) -> dict[str, Bound]:
    """Field → its bound, of the structs that `limits` are about."""
    found: dict[str, Bound] = {}
    if issubclass(kind, SampledFields):
        found |= {
            "n": Bound(maximum=limits.n_max),
            "max_tokens": Bound(maximum=limits.max_tokens_max),
            "stop": Bound(items_max=limits.stop_max, chars_max=limits.stop_chars_max),
            "logit_bias": Bound(properties_max=limits.logit_bias_max),
        }
    if kind is ChatRequest:
        found |= {
            "messages": Bound(items_max=limits.messages_max),
            "max_completion_tokens": Bound(maximum=limits.max_tokens_max),
            "top_logprobs": Bound(maximum=limits.top_logprobs_max),
            "tools": Bound(items_max=limits.tools_max),
            "functions": Bound(items_max=limits.tools_max),
        }
    if kind is CompletionRequest:
        found |= {
            "prompt": Bound(items_max=limits.inputs_max),
            "best_of": Bound(maximum=limits.n_max),
            "logprobs": Bound(maximum=limits.top_logprobs_max),
        }
    if kind is EmbeddingsRequest:
        found |= {
            "input": Bound(items_max=limits.inputs_max),
            "dimensions": Bound(maximum=limits.dimensions_max),
        }
    if issubclass(kind, PromptToCount):
        found["messages"] = Bound(items_max=limits.messages_max)
        found["tools"] = Bound(items_max=limits.tools_max)
    if kind is MessageRequest:
        found["max_tokens"] = Bound(maximum=limits.max_tokens_max)
        found["stop_sequences"] = Bound(items_max=limits.stop_max, chars_max=limits.stop_chars_max)
    if kind is ResponseRequest:
        found |= {
            "max_output_tokens": Bound(maximum=limits.max_tokens_max),
            "tools": Bound(items_max=limits.tools_max),
        }
    return found
