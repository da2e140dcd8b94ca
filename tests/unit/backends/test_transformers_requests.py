"""What the torch engine reads of a request, before any model is asked."""

from __future__ import annotations

import msgspec
import pytest

from serverlessllm.backends.inside.transformers.asks import (
    INPUTS_MAX,
    ChatAsk,
    EmbeddingAsk,
    read,
    texts,
)
from serverlessllm.backends.inside.transformers.messages import RawMessage, templated
from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.settings import RequestLimits


def messages(body: bytes) -> list[str]:
    read_ones = msgspec.json.decode(body, type=list[RawMessage])
    return [message.content for message in templated(read_ones)]


def test_a_refusal_is_what_the_model_said() -> None:
    parts = b'{"role":"assistant","content":[{"type":"refusal","refusal":"no"}]}'
    field = b'{"role":"assistant","content":null,"refusal":"no"}'
    assert messages(b"[%b,%b]" % (parts, field)) == ["no", "no"]


def test_anything_but_text_is_refused() -> None:
    with pytest.raises(InvalidRequest) as refused:
        messages(b'[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:"}}]}]')
    assert refused.value.param == "messages[0].content[0]"


@pytest.mark.parametrize(
    ("field", "param"),
    [
        (b'"modalities":["text","audio"]', "modalities[1]"),
        (b'"web_search_options":{}', "web_search_options"),
    ],
)
def test_what_no_engine_here_does_is_refused(field: bytes, param: str) -> None:
    body = b'{"messages":[{"role":"user","content":"hi"}],%b}'
    with pytest.raises(InvalidRequest) as refused:
        read(body % field, ChatAsk)
    assert refused.value.param == param
    read(body % b'"modalities":["text"],"web_search_options":null', ChatAsk)


def test_as_many_inputs_as_the_front_door_lets_through() -> None:
    assert RequestLimits().inputs_max == INPUTS_MAX
    ask = read(msgspec.json.encode({"input": ["w"] * INPUTS_MAX}), EmbeddingAsk)
    assert len(texts("input", ask.input, INPUTS_MAX)) == INPUTS_MAX
