"""Whatever is wrong with a request of another dialect is told as such, and never is a bug."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlessllm.core.errors import ClientError
from serverlessllm.openai.messages.chat import to_chat as message_to_chat
from serverlessllm.openai.messages.request import parse_create as parse_message
from serverlessllm.openai.request import parse_chat
from serverlessllm.openai.responses.chat import to_chat as response_to_chat
from serverlessllm.openai.responses.items import ItemReference
from serverlessllm.openai.responses.request import parse_create as parse_response
from serverlessllm.openai.settings import RequestLimits

LIMITS = RequestLimits()
RESPONSE = {
    "model": "m",
    "instructions": "i",
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "a"},
                {"type": "input_image", "image_url": "data:image/png;base64,AA=="},
                {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
            ],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [{"type": "input_text", "text": "x"}],
        },
        {"type": "reasoning", "id": "r", "summary": []},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    "tool_choice": {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "f"}],
    },
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    "reasoning": {"effort": "low"},
    "metadata": {"a": "b"},
    "max_output_tokens": 5,
    "top_logprobs": 2,
}
MESSAGE = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {
            "role": "user",
            "content": [
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": "AA=="},
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "x", "signature": ""},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "text", "text": "x"}],
                }
            ],
        },
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "tool", "name": "f"},
    "stop_sequences": ["a"],
    "metadata": {"user_id": "u"},
    "output_config": {"format": {"type": "json_schema", "schema": {}}},
}


def response(body):
    create = parse_response(body, LIMITS, "u")
    items = [item for item in create.items if not isinstance(item, ItemReference)]
    return response_to_chat(create, (), items)


def message(body):
    return message_to_chat(parse_message(body, LIMITS))


def places(value, path=()):
    """The path of each value inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, found in list(inside):
        yield (*path, key)
        if isinstance(found, dict | list):
            yield from places(found, (*path, key))


ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        -1,
        1e300,
        2**70,
        "",
        "x",
        "\ud800",
        [],
        {},
        [[]],
        [1],
        {"type": "text"},
        "a" * 999,
    ]
)


@pytest.mark.parametrize(("whole", "translate"), [(RESPONSE, response), (MESSAGE, message)])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_wrong_value(whole, translate, data):
    body = copy.deepcopy(whole)
    *path, last = data.draw(st.sampled_from(list(places(whole))))
    holder = body
    for key in path:
        holder = holder[key]
    holder[last] = data.draw(ODD)
    with contextlib.suppress(ClientError):
        chat = translate(json.dumps(body).encode())
        parse_chat(chat.body, LIMITS)


@pytest.mark.parametrize(("whole", "translate"), [(RESPONSE, response), (MESSAGE, message)])
def test_what_is_right_is_a_chat(whole, translate):
    chat = translate(json.dumps(whole).encode())
    parse_chat(chat.body, LIMITS)
    assert len(chat.places) == len(json.loads(chat.body)["messages"])
