"""The OpenAPI document: true, complete, and what its readers expect."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import InvalidModelName, InvalidRequest
from serverlessllm.core.ids import parse_model_id
from serverlessllm.core.units import parse_duration_s
from serverlessllm.openai.document import Answer, Operation, build_document
from serverlessllm.openai.document.answers import ChatCompletion, ChatCompletionChunk
from serverlessllm.openai.document.operation import EVENTS
from serverlessllm.openai.request import ChatRequest, parse_chat
from serverlessllm.openai.request.patterns import DURATION, MODEL, NAME
from serverlessllm.openai.settings import RequestLimits

LIMITS = RequestLimits(n_max=3, messages_max=5, stop_max=2)
CHAT = Operation(
    path="/v1/chat/completions",
    method="post",
    tag="Inference",
    summary="Continue a conversation",
    body=ChatRequest,
    example='{"model":"m"}',
    answers=(
        Answer(description="It.", type=ChatCompletion),
        Answer(description="Events.", type=ChatCompletionChunk, content_type=EVENTS),
    ),
    errors=(400, 503),
)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    text = build_document([CHAT], tags={"Inference": "x"}, limits=LIMITS, version="1")
    found: dict[str, Any] = json.loads(text)
    return found


def test_every_reference_leads_somewhere(document):
    references = set(re.findall(r'"\$ref": ?"#/([^"]+)"', json.dumps(document)))
    assert references
    for reference in references:
        place = document
        for step in reference.split("/"):
            place = place[step]


def test_fields_are_described_by_their_docstrings(document):
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["description"] == "A conversation that the model shall continue."
    assert chat["properties"]["messages"]["description"] == "The conversation so far."
    assert chat["properties"]["model"]["description"].startswith("A registered model's name")
    assert chat["required"] == ["model", "messages"]


def test_bounds_that_are_settings_are_told(document):
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 3}
    assert fields["messages"]["maxItems"] == 5
    assert fields["stop"]["anyOf"][1]["maxItems"] == 2
    assert fields["stop"]["anyOf"][1]["items"]["maxLength"] == LIMITS.stop_chars_max
    user = {"role": "user", "content": "x"}
    for field, good, bad in (
        ("n", 3, 4),
        ("messages", [user] * 5, [user] * 6),
        ("stop", ["a"] * 2, ["a"] * 3),
    ):
        body = {"model": "m", "messages": [user]}
        assert parse_chat(json.dumps(body | {field: good}).encode(), LIMITS).model == "m"
        with pytest.raises(InvalidRequest):
            parse_chat(json.dumps(body | {field: bad}).encode(), LIMITS)


def test_an_answer_has_all_of_its_fields_and_a_request_needs_few(document):
    schemas = document["components"]["schemas"]
    assert "system_fingerprint" in schemas["ChatCompletion"]["required"]
    assert "tool_calls" not in schemas["AnswerMessage"]["required"]
    assert schemas["StreamOptions"]["required"] == []


def test_a_stream_is_told_event_by_event(document):
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    data = answers["200"]["content"]["text/event-stream"]["schema"]["properties"]["data"]
    assert {"const": "[DONE]"} in data["anyOf"]
    assert "ChatCompletionChunk" in json.dumps(data)
    assert answers["503"] == {"$ref": "#/components/responses/503"}
    assert "retry-after" in document["components"]["responses"]["503"]["headers"]
    assert "retry-after" not in document["components"]["responses"]["400"]["headers"]


def test_errors_have_their_four_keys(document):
    fields = document["components"]["schemas"]["ErrorFields"]
    assert fields["required"] == ["message", "type", "param", "code"]


@given(st.from_regex(MODEL) | st.text("aZ0._-/@ \n", max_size=12))
def test_the_form_of_a_models_name_is_the_parsers(text):
    try:
        parse_model_id(text)
    except InvalidModelName:
        assert not re.search(MODEL, text)
    else:
        assert re.search(MODEL, text)


@given(st.from_regex(DURATION) | st.text("0159.msdh-", max_size=8))
def test_the_form_of_a_duration_is_the_parsers(text):
    text = text[:64]
    try:
        parse_duration_s(text)
    except ValueError:
        assert not re.search(DURATION, text)
    else:
        assert re.search(DURATION, text)


@pytest.mark.parametrize(("name", "good"), [("a-B_9", True), ("a\n", False), ("", False)])
def test_the_form_of_a_tools_name(name, good):
    assert bool(re.search(NAME, name)) is good
