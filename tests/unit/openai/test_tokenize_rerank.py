"""The operations beside the API's own: what their requests may say."""

from __future__ import annotations

import json

import pytest

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.rerank import parse_rerank
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.openai.tokenize import parse_detokenize, parse_tokenize
from serverlessllm.orchestrator.rest.inference import Parse

LIMITS = RequestLimits(inputs_max=3, token_ids_max=3)
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("parse", "fields"),
    [
        (parse_tokenize, {"prompt": "a", "keep_alive": "5m"}),
        (parse_tokenize, {"messages": MESSAGES}),
        (parse_detokenize, {"tokens": []}),
        (parse_detokenize, {"tokens": [1, 2]}),
        (parse_rerank, {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}),
    ],
)
def test_what_is_taken(parse: Parse, fields: dict[str, object]) -> None:
    body = json.dumps({"model": "org/name"} | fields).encode()
    assert parse(body, LIMITS).model == "org/name"


@pytest.mark.parametrize(
    ("parse", "fields", "param"),
    [
        (parse_tokenize, {}, "prompt"),
        (parse_tokenize, {"prompt": "a", "messages": MESSAGES}, "prompt"),
        (parse_tokenize, {"messages": []}, "messages"),
        (parse_tokenize, {"messages": MESSAGES, "continue_final_message": True},
         "continue_final_message"),
        (parse_detokenize, {}, "tokens"),
        (parse_detokenize, {"tokens": [-1]}, "tokens[0]"),
        (parse_detokenize, {"tokens": [1, 2, 3, 4]}, "tokens"),
        (parse_rerank, {"query": "a"}, "documents"),
        (parse_rerank, {"query": "a", "documents": []}, "documents"),
        (parse_rerank, {"query": "a", "documents": ["b"] * 4}, "documents"),
        (parse_rerank, {"query": "a", "documents": [{"image": "b"}]}, "documents[0].text"),
        (parse_rerank, {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
    ],
)  # fmt: skip
def test_what_is_refused(parse: Parse, fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(json.dumps({"model": "m"} | fields).encode(), LIMITS)
    assert refusal.value.param == param
