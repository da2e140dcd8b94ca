"""What `/v1/responses` takes, and the chat that it becomes."""

from __future__ import annotations

import json

import pytest

from serverlessllm.core.errors import ClientError, InvalidJSON, InvalidRequest
from serverlessllm.openai.chats import Failure
from serverlessllm.openai.errors import ErrorFields
from serverlessllm.openai.request import parse_chat
from serverlessllm.openai.responses.chat import to_chat, to_count, to_own_words
from serverlessllm.openai.responses.items import FunctionCall, ItemReference, Message, OutputText
from serverlessllm.openai.responses.request import parse_create
from serverlessllm.openai.settings import RequestLimits

LIMITS = RequestLimits()
TOOL = {
    "type": "function",
    "name": "find",
    "description": "Find.",
    "parameters": {"type": "object"},
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


def create(**fields):
    return parse_create(json.dumps({"model": "m", **fields}).encode(), LIMITS, "u")


def chat(*, history=(), **fields):
    asked = create(**fields)
    written = to_chat(asked, history, asked.items)
    parse_chat(written.body, LIMITS)  # what a chat takes
    return json.loads(written.body), written.places


def refused(**fields):
    with pytest.raises(InvalidRequest) as refusal:
        create(**({"input": "hi"} | fields))
    assert refusal.value.message.startswith(f"{refusal.value.param}: ")
    return refusal.value.param, refusal.value.message


def test_a_text_is_a_users_message():
    body, places = chat(input="hi")
    assert body == {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert places == ("input[0]",)


def test_a_stream_asks_for_its_usage():
    body, _ = chat(input="hi", stream=True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


def test_what_stands_first_is_one_system_message():
    body, places = chat(
        instructions="Be kind.",
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "input_text", "text": "Be true."}]},
            {"role": "user", "content": "hi"},
            {"type": "message", "role": "developer", "content": "Now shout."},
        ],
    )
    assert body["messages"] == [
        {"role": "system", "content": "Be kind.\n\nBe brief.\n\nBe true."},
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "Now shout."},
    ]
    assert places == ("instructions", "input[2]", "input[3]")


def test_calls_of_one_turn_are_one_message_and_their_outputs_follow():
    body, places = chat(
        input=[
            {"role": "user", "content": "hi"},
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "find", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "find", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [
                    {"type": "input_text", "text": "two"},
                    {"type": "input_image", "image_url": "data:image/png;base64,AA=="},
                ],
            },
        ]
    )
    call = {"type": "function", "id": "c1", "function": {"name": "find", "arguments": "{}"}}
    assert body["messages"][1]["content"] == "Let me see."
    assert body["messages"][1]["tool_calls"][0] == call
    assert body["messages"][1]["tool_calls"][1]["function"]["arguments"] == '{"a":1}'
    assert body["messages"][2] == {"role": "tool", "content": "one", "tool_call_id": "c1"}
    assert body["messages"][3] == {"role": "tool", "content": "two", "tool_call_id": "c2"}
    assert body["messages"][4]["content"][0]["type"] == "image_url"
    assert places == ("input[0]", "input[2]", "input[5]", "input[6]", "input[6].output")


def test_media_keep_their_order_among_texts():
    body, _ = chat(
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What is it?"},
                    {
                        "type": "input_image",
                        "image_url": "data:image/png;base64,AA==",
                        "detail": "low",
                    },
                    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
                ],
            }
        ]
    )
    assert [part["type"] for part in body["messages"][0]["content"]] == [
        "text",
        "image_url",
        "input_audio",
    ]
    assert body["messages"][0]["content"][1]["image_url"]["detail"] == "low"


def test_history_comes_before_the_input_and_after_the_instructions():
    history = (
        Message(id="a", role="user", content=()),
        Message(id="b", role="assistant", content=(OutputText(text="yes"),)),
        FunctionCall(id="c", call_id="c1", name="find", arguments="{}"),
    )
    body, places = chat(history=history, instructions="Be kind.", input="hi")
    assert [message["role"] for message in body["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert places == ("instructions", "previous_response_id", "previous_response_id", "input[0]")


def test_tools_and_the_choice_among_them():
    body, _ = chat(input="hi", tools=[TOOL, TOOL | {"name": "other"}], parallel_tool_calls=False)
    function = {"name": "find", "description": "Find.", "parameters": {"type": "object"}}
    assert body["tools"][0] == {"type": "function", "function": function}
    assert (body["tool_choice"], body["parallel_tool_calls"]) == ("auto", False)
    body, _ = chat(input="hi", tools=[TOOL], tool_choice={"type": "function", "name": "find"})
    assert body["tool_choice"] == {"type": "function", "function": {"name": "find"}}
    body, _ = chat(
        input="hi",
        tools=[TOOL, TOOL | {"name": "other"}],
        tool_choice={
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "other"}],
        },
    )
    assert [tool["function"]["name"] for tool in body["tools"]] == ["other"]
    assert body["tool_choice"] == "required"


def test_formats():
    body, _ = chat(input="hi", text={"format": {"type": "text"}, "verbosity": "low"})
    assert "response_format" not in body
    body, _ = chat(input="hi", text={"format": {"type": "json_object"}})
    assert body["response_format"] == {"type": "json_object"}
    wanted = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    body, _ = chat(input="hi", text={"format": wanted})
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
    }


def test_numbers_go_by_the_chats_names_and_strangers_pass_through():
    body, _ = chat(
        input="hi",
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_logprobs=3,
        reasoning={"effort": "low", "summary": "auto"},
        user="me",
        keep_alive="5m",
        seed=4,
        messages=[],
        n=9,
        max_tokens=1,
        include=["reasoning.encrypted_content"],
        service_tier="auto",
        truncation="disabled",
    )
    del body["messages"]
    assert body == {
        "model": "m",
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "logprobs": True,
        "top_logprobs": 3,
        "reasoning_effort": "low",
        "user": "me",
        "keep_alive": "5m",
        "seed": 4,
    }


def test_references_wait_to_be_resolved():
    items = create(input=[{"type": "item_reference", "id": "msg_1"}, {"id": "msg_2"}]).items
    assert items == (ItemReference(id="msg_1"), ItemReference(id="msg_2"))


def test_a_count_asks_for_nothing_but_tokens():
    asked = create(input="hi", tools=[TOOL], temperature=0)
    body = json.loads(to_count(asked, (), asked.items).body)
    assert set(body) == {"model", "messages", "tools"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "at least one"),
        ({"input": 3}, "input", "expected"),
        ({"input": ["hi"]}, "input[0]", "expected"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "'web_search_call'"),
        ({"input": [{"role": "robot", "content": "hi"}]}, "input[0].role", "'robot'"),
        ({"input": [{"role": "user"}]}, "input[0].content", "required"),
        ({"input": [{"role": "user", "content": [1]}]}, "input[0].content[0]", "expected"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
            "'input_file'",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].image_url",
            "data: URL",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f"}]},
            "input[0].arguments",
            "required",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "required"),
        ({"tools": [TOOL] * 129}, "tools", "at most 128"),
        ({"tool_choice": "maybe"}, "tool_choice", "'maybe'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "'file_search'"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x'"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'xml'"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name", "required"),
        ({"tools": "x"}, "tools", "expected `array`, got `str`"),
        ({"tools": [TOOL, None]}, "tools[1]", "expected `object`, got `null`"),
        ({"input": [1, 2]}, "input[0]", "expected `object`, got `int`"),
        ({"background": True}, "background", "leave"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "instructions"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
        ({"max_output_tokens": 0}, "max_output_tokens", ">= 1"),
        ({"temperature": 3}, "temperature", "<= 2"),
        ({"top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"store": "yes"}, "store", "bool"),
    ],
)
def test_what_is_wrong_is_named(fields, param, words):
    found, message = refused(**fields)
    assert found == param
    assert words in message


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"model":"\xff"}', b"[" * 100])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(InvalidJSON):
        parse_create(body, LIMITS, "u")


def test_a_model_is_needed():
    with pytest.raises(ClientError) as refusal:
        parse_create(b'{"input":"hi"}', LIMITS, "u")
    assert refusal.value.param == "model"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages[0]", "instructions"),
        ("messages[0].content", "instructions"),
        ("messages[1].content[2].image_url", "input[0].content[2]"),
        ("messages[1]", "input[0]"),
        ("messages[9]", "input"),
        ("messages", "input"),
        ("max_completion_tokens", "max_output_tokens"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("response_format", "text.format"),
        ("tools[3].function.parameters", "tools[3].parameters"),
        ("tools[3]", "tools[3]"),
        ("model", "model"),
        ("keep_alive", "keep_alive"),
    ],
)
def test_a_chats_complaint_is_told_in_our_words(theirs, ours):
    asked = create(instructions="Be kind.", input="hi")
    written = to_chat(asked, (), asked.items)
    error = ErrorFields(message=f"{theirs}: no", type="t", param=theirs, code="c")
    told = to_own_words(Failure(status=400, error=error), written).error
    assert (told.param, told.message) == (ours, f"{ours}: no")


def test_a_complaint_without_a_field_stays_as_it_is():
    asked = create(input="hi")
    failure = Failure(status=503, error=ErrorFields(message="busy", type="t", param=None, code="c"))
    assert to_own_words(failure, to_chat(asked, (), asked.items)) is failure


def test_thousands_of_system_items_and_calls_are_joined():
    long = {"role": "system", "content": "x" * 3_000_000}
    short = {"role": "system", "content": "y"}
    call = {"type": "function_call", "call_id": "", "name": "", "arguments": ""}
    asked = create(input=[long, *[short] * 8_000, *[call] * 5_000, short])
    written = json.loads(to_chat(asked, (), asked.items).body)["messages"]
    assert [message["role"] for message in written] == ["system", "assistant", "system"]
    assert written[0]["content"].count("y") == 8_000
    assert len(written[1]["tool_calls"]) == 5_000
