"""OpenAI's client on `/v1/responses`, Anthropic's on `/v1/messages`: every answer is checked
strictly against the client's own types, on the fake engine and on llama.cpp."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
QUESTION = "What is the weather in Paris?"
TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": SCHEMA,
    "strict": True,
}
ANTHROPIC_TOOL: Any = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": SCHEMA,
}
MODELS = pytest.mark.parametrize("model", ["fake", "tiny"])
"""`tiny` is random weights in llama.cpp."""
REAL = "smollm2"
"""The demo's model, of which `sllm serve` knows; its answers make sense."""


@pytest.fixture(scope="module")
def responses(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="any",
        max_retries=0,
        timeout=60,
        _strict_response_validation=True,
    ) as client:
        yield client.responses


@pytest.fixture(scope="module")
def messages(server):
    with anthropic.Anthropic(
        base_url=server.url,
        api_key="any",
        max_retries=0,
        timeout=60,
        _strict_response_validation=True,
    ) as client:
        yield client.messages


@MODELS
def test_a_response_whole_and_streamed(responses, model):
    asked = {"model": model, "input": "What is 2+2?", "max_output_tokens": 8, "temperature": 0}
    whole = responses.create(**asked, extra_body={"seed": 1})
    with responses.create(**asked, stream=True, extra_body={"seed": 1}) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    assert (last.output_text, last.status) == (whole.output_text, whole.status)
    assert last.incomplete_details.reason == "max_output_tokens"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) > 1
    assert last.usage.output_tokens == whole.usage.output_tokens == 8
    assert last.usage.input_tokens > 0


@MODELS
def test_scores_of_a_response(responses, model):
    asked = {"model": model, "input": "Hi", "max_output_tokens": 2, "top_logprobs": 2}
    (part,) = responses.create(**asked).output[0].content
    assert len(part.logprobs) == 2
    with responses.create(**asked, stream=True) as stream:
        scores = [len(e.logprobs) for e in stream if e.type == "response.output_text.delta"]
    assert sum(scores) == 2


@MODELS
def test_a_conversation_goes_on_is_listed_and_is_forgotten(responses, model):
    first = responses.create(model=model, input="My name is Bob.", max_output_tokens=4)
    second = responses.create(
        model=model, input="And mine?", previous_response_id=first.id, max_output_tokens=4
    )
    assert second.usage.input_tokens > first.usage.input_tokens
    assert responses.retrieve(second.id) == second
    roles = [item.role for item in responses.input_items.list(second.id, limit=1, order="asc")]
    assert roles == ["user", "assistant", "user"]
    responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(second.id)


@MODELS
def test_tokens_are_counted(responses, messages, model):
    counted = responses.input_tokens.count(model=model, input="What is 2+2?")
    asked = [{"role": "user", "content": "What is 2+2?"}]
    assert messages.count_tokens(model=model, messages=asked).input_tokens == counted.input_tokens
    answer = messages.create(model=model, messages=asked, max_tokens=1)
    used = answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    assert used == counted.input_tokens


def test_a_response_calls_a_tool_and_uses_what_it_says(responses):
    asked = {"model": REAL, "tools": [TOOL], "temperature": 0}
    with responses.create(**asked, input=QUESTION, tool_choice="required", stream=True) as stream:
        events = list(stream)
    (call,) = events[-1].response.output
    assert json.loads(call.arguments)["city"] in {"Paris", "Rome"}
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 20 °C."}
    answer = responses.create(
        **asked,
        input=[output],
        previous_response_id=events[-1].response.id,
        tool_choice="none",
        max_output_tokens=24,
    )
    assert answer.output_text


def test_a_response_follows_a_schema(responses):
    text: Any = {"format": {"type": "json_schema", "name": "c", "schema": SCHEMA, "strict": True}}
    answer = responses.create(model=REAL, input="Name a city.", text=text, max_output_tokens=40)
    assert json.loads(answer.output_text)["city"] in {"Paris", "Rome"}


@MODELS
def test_a_message_whole_and_streamed(messages, model):
    asked = {
        "model": model,
        "max_tokens": 8,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2+2?"}]}],
    }
    whole = messages.create(**asked, extra_body={"seed": 1, "temperature": 0})
    assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 8)
    with messages.stream(**asked, extra_body={"seed": 1, "temperature": 0}) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == last.content[0].text == whole.content[0].text
    assert (last.stop_reason, last.usage.output_tokens) == ("max_tokens", 8)


def test_a_message_uses_a_tool_and_what_it_says(messages):
    question = {"role": "user", "content": QUESTION}
    asked = {"model": REAL, "tools": [ANTHROPIC_TOOL], "extra_body": {"temperature": 0}}
    with messages.stream(
        **asked, max_tokens=64, messages=[question], tool_choice={"type": "any"}
    ) as stream:
        called = stream.get_final_message()
    (use,) = called.content
    assert (called.stop_reason, use.type) == ("tool_use", "tool_use")
    assert use.input["city"] in {"Paris", "Rome"}
    answer = messages.create(
        **asked,
        max_tokens=24,
        tool_choice={"type": "none"},
        messages=[
            question,
            {"role": "assistant", "content": called.content},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Sunny."}],
            },
        ],
    )
    assert answer.content[0].text


def test_a_message_follows_a_schema(messages):
    output: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = messages.create(
        model=REAL,
        max_tokens=40,
        output_config=output,
        messages=[{"role": "user", "content": "Name a city."}],
    )
    assert json.loads(answer.content[0].text)["city"] in {"Paris", "Rome"}


def test_what_is_not_served_is_named(responses, messages):
    with pytest.raises(openai.BadRequestError) as refused:
        responses.create(model="fake", input="hi", tools=[{"type": "web_search"}])
    assert (refused.value.param, "web_search" in refused.value.message) == ("tools[0].type", True)
    with pytest.raises(openai.BadRequestError) as refused:
        responses.create(model="fake", input="hi", background=True)
    assert refused.value.param == "background"
    with pytest.raises(anthropic.BadRequestError, match="web_search_20250305"):
        messages.create(
            model="fake",
            max_tokens=1,
            messages=[{"role": "user", "content": "hi"}],
            tools=[{"type": "web_search_20250305", "name": "web_search"}],
        )
