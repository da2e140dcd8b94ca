"""`/v1/messages`: the chat that a request becomes, and the message that an answer becomes."""

from __future__ import annotations

import json

import msgspec
import pytest
from anthropic.types import ErrorResponse, Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from serverlessllm.core.errors import BackendProtocolError, InvalidRequest
from serverlessllm.openai.chats import (
    Choice,
    Delta,
    Failure,
    FunctionPiece,
    ToolCallPiece,
    read_answer,
)
from serverlessllm.openai.errors import ErrorFields
from serverlessllm.openai.messages.answer import begun, whole
from serverlessllm.openai.messages.chat import to_chat, to_count, to_own_words
from serverlessllm.openai.messages.errors import error_body, error_frame
from serverlessllm.openai.messages.events import Assembly, Ping
from serverlessllm.openai.messages.request import parse_count, parse_create
from serverlessllm.openai.request import parse_chat
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.openai.sse import typed_event
from serverlessllm.testing.dialects import call, told

LIMITS = RequestLimits()
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
TOOL = {"name": "find", "description": "Find.", "input_schema": {"type": "object"}}
HI = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
DATA_URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
USAGE = read_answer(
    b'{"usage":{"prompt_tokens":9,"completion_tokens":4,'
    b'"prompt_tokens_details":{"cached_tokens":3}}}'
).usage


def create(**fields):
    asked = {"model": "m", "max_tokens": 8, "messages": HI} | fields
    return parse_create(json.dumps(asked).encode(), LIMITS)


def chat(**fields):
    written = to_chat(create(**fields))
    parse_chat(written.body, LIMITS)  # what a chat takes
    return json.loads(written.body), written.places


def test_a_text_is_a_users_message():
    body, places = chat()
    assert body == {"model": "m", "messages": HI, "max_completion_tokens": 8}
    assert places == ("messages[0]",)


@pytest.mark.parametrize(
    "system",
    ["Be kind.\n\nBe brief.", [{"type": "text", "text": t} for t in ("Be kind.", "Be brief.")]],
)
def test_the_system_prompt_stands_first(system):
    body, places = chat(system=system)
    assert body["messages"][0] == {"role": "system", "content": "Be kind.\n\nBe brief."}
    assert places == ("system", "messages[0]")


def test_blocks():
    body, places = chat(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "find", "input": {"a": [1]}},
                    {"type": "tool_use", "id": "t2", "name": "find", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "is_error": True,
                        "content": [{"type": "text", "text": "two"}, IMAGE],
                    },
                    {"type": "text", "text": "Go on.", "cache_control": {"type": "ephemeral"}},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t3", "name": "find", "input": {}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t3"}]},
            {"role": "system", "content": "Now shout."},
        ]
    )
    first, second, one, two, more, third, three, shout = body["messages"]
    assert first["content"] == [{"type": "text", "text": "What is it?"}, DATA_URL]
    assert second["content"] == "Let me see."
    assert second["tool_calls"][0] == {
        "type": "function",
        "id": "t1",
        "function": {"name": "find", "arguments": '{"a":[1]}'},
    }
    assert one == {"role": "tool", "content": "one", "tool_call_id": "t1"}
    assert two == {"role": "tool", "content": "two", "tool_call_id": "t2"}
    assert more == {"role": "user", "content": [DATA_URL, {"type": "text", "text": "Go on."}]}
    assert "content" not in third
    assert three == {"role": "tool", "content": "", "tool_call_id": "t3"}
    assert shout == {"role": "system", "content": "Now shout."}
    assert places[:3] == ("messages[0]", "messages[1]", "messages[2].content")


@pytest.mark.parametrize(
    ("choice", "theirs", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", None),
        (
            {"type": "tool", "name": "find"},
            {"type": "function", "function": {"name": "find"}},
            None,
        ),
    ],
)
def test_tools_and_the_choice_among_them(choice, theirs, parallel):
    body, _ = chat(tools=[TOOL | {"type": "custom"}], tool_choice=choice)
    assert body["tools"] == [
        {
            "type": "function",
            "function": {"name": "find", "description": "Find.", "parameters": {"type": "object"}},
        }
    ]
    assert (body["tool_choice"], body.get("parallel_tool_calls")) == (theirs, parallel)


def test_a_last_turn_of_the_models_own_is_the_beginning_of_its_answer():
    turns = [*HI, {"role": "assistant", "content": "Well,"}]
    body, _ = chat(messages=turns)
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False
    assert "continue_final_message" not in chat(messages=[*turns, *HI])[0]


def test_numbers_go_by_the_chats_names_and_strangers_pass_through():
    body, _ = chat(
        stream=True,
        stop_sequences=["a", "b"],
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        metadata={"user_id": "me"},
        output_config={
            "effort": "low",
            "format": {"type": "json_schema", "schema": {"type": "object"}},
        },
        thinking={"type": "enabled", "budget_tokens": 1024},
        service_tier="auto",
        keep_alive="5m",
        seed=4,
        n=3,
        stop="x",
    )
    del body["messages"]
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["a", "b"],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
        "reasoning_effort": "low",
        "user": "me",
        "keep_alive": "5m",
        "seed": 4,
    }


def test_a_count_needs_no_bound():
    asked = {"model": "m", "messages": HI, "system": "Be kind.", "tools": [TOOL]}
    body = json.loads(to_count(parse_count(json.dumps(asked).encode(), LIMITS)).body)
    assert set(body) == {"model", "messages", "tools"}
    assert len(body["messages"]) == 2


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "expected"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "expected"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            "messages[0].content[0].type",
            "'document'",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}],
                    }
                ]
            },
            "messages[0].content[0].type",
            "role 'user'",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "t"}]}
                ]
            },
            "messages[0].content[0].type",
            "role 'assistant'",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "t", "name": "f", "input": "x"}],
                    }
                ]
            },
            "messages[0].content[0].input",
            "object",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [IMAGE | {"source": {"type": "file", "file_id": "f"}}],
                    }
                ]
            },
            "messages[0].content[0].source.type",
            "'file'",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t",
                                "content": [{"type": "document"}],
                            }
                        ],
                    }
                ]
            },
            "messages[0].content[0].content[0].type",
            "'document'",
        ),
        ({"system": [IMAGE]}, "system[0].type", "'image'"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0].type",
            "'web_search_20250305'",
        ),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema", "required"),
        ({"tools": {}}, "tools", "expected `array`, got `object`"),
        ({"tools": [TOOL, 7]}, "tools[1]", "expected `object`, got `int`"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "no tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}},
            "tool_choice.name",
            "'x'",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type", "'some'"),
        ({"temperature": 1.5}, "temperature", "<= 1"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "length"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers", "tools of its own"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type", "'xml'"),
    ],
)
def test_what_is_wrong_is_named(fields, param, words):
    with pytest.raises(InvalidRequest) as refusal:
        create(**fields)
    assert refusal.value.param == param
    assert words in refusal.value.message


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages[0].content", "system"),
        ("messages[1].content[0].image_url", "messages[0].content[0]"),
        ("max_completion_tokens", "max_tokens"),
        ("stop", "stop_sequences"),
        ("user", "metadata.user_id"),
        ("tools[2].function.parameters", "tools[2].input_schema"),
        ("tools[2].function.name", "tools[2].name"),
        ("response_format.json_schema.schema", "output_config.format"),
        ("model", "model"),
    ],
)
def test_a_chats_complaint_is_told_in_our_words(theirs, ours):
    written = to_chat(create(system="Be kind."))
    error = ErrorFields(message=f"{theirs}: no", type="t", param=theirs, code="c")
    told = to_own_words(Failure(status=400, error=error), written).error
    assert (told.param, told.message) == (ours, f"{ours}: no")


def play(choices, *, thinks=False, usage=USAGE):
    made = Assembly(begun("msg_u", "m"), thinks)
    events = made.begin()
    for choice in choices:
        events += made.take(choice)
    events += made.end(usage)
    return told([event for event in events if not isinstance(event, Ping)], EVENT)


def test_a_streamed_text():
    events = play(
        [
            Choice(delta=Delta(content="")),
            Choice(delta=Delta(content="fo")),
            Choice(delta=Delta(content="ur")),
            Choice(delta=Delta(), finish_reason="stop"),
        ]
    )
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0].message.id == "msg_u"
    assert events[-2].delta.stop_reason == "end_turn"
    usage = events[-2].usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (6, 3, 4)


def test_streamed_thoughts_texts_and_calls_are_blocks_in_turn():
    events = play(
        [
            Choice(delta=Delta(reasoning_content="Hm.")),
            Choice(delta=Delta(content="Let me see.")),
            call(0, name="find", call_id="t1"),
            call(0, arguments='{"a":'),
            call(0, arguments="1}"),
            call(1, name="find", arguments="{}"),
            Choice(delta=Delta(), finish_reason="stop"),
        ],
        thinks=True,
    )
    starts = [event for event in events if event.type == "content_block_start"]
    assert [start.index for start in starts] == [0, 1, 2, 3]
    assert [start.content_block.type for start in starts] == [
        "thinking",
        "text",
        "tool_use",
        "tool_use",
    ]
    assert starts[2].content_block.id == "t1"
    assert starts[3].content_block.id
    pieces = [
        e.delta.partial_json for e in events if e.type == "content_block_delta" and e.index == 2
    ]
    assert "".join(pieces) == '{"a":1}'
    assert events[-2].delta.stop_reason == "tool_use"


def test_thoughts_are_told_only_to_those_who_want_them():
    choice = Choice(message=Delta(reasoning_content="Hm.", content="Yes."), finish_reason="stop")
    assert [b.type for b in message(choice).content] == ["text"]
    assert [b.type for b in message(choice, thinks=True).content] == ["thinking", "text"]
    assert len(play([Choice(delta=Delta(reasoning_content="Hm."))])) == 5


def test_calls_that_are_mixed_up_are_no_answer():
    with pytest.raises(BackendProtocolError):
        play([call(0, name="a"), call(1, name="b"), call(0, arguments="{}")])


def message(choice, *, thinks=False, usage=USAGE):
    made = whole(begun("msg_u", "m"), choice, usage, thinks)
    return Message.model_validate_json(msgspec.json.encode(made), strict=True)


@pytest.mark.parametrize(
    ("choice", "reason", "sequence"),
    [
        (Choice(finish_reason="stop"), "end_turn", None),
        (Choice(finish_reason="length"), "max_tokens", None),
        (Choice(finish_reason="content_filter"), "refusal", None),
        (Choice(finish_reason="stop", stop_reason="END"), "stop_sequence", "END"),
        (Choice(finish_reason="stop", stop_reason=128001), "end_turn", None),
    ],
)
def test_why_it_ended(choice, reason, sequence):
    found = message(choice)
    assert (found.stop_reason, found.stop_sequence) == (reason, sequence)
    assert found.content[0].type == "text"
    assert play([choice])[-2].delta.stop_reason == reason


def calling(arguments, finish_reason="tool_calls"):
    piece = ToolCallPiece(index=0, id="t1", function=FunctionPiece("find", arguments))
    return Choice(message=Delta(tool_calls=(piece,)), finish_reason=finish_reason)


@pytest.mark.parametrize(("arguments", "input_"), [('{"a":[1]}', {"a": [1]}), ("", {}), (None, {})])
def test_a_whole_call(arguments, input_):
    found = message(calling(arguments))
    assert [block.type for block in found.content] == ["tool_use"]
    assert (found.content[0].input, found.stop_reason) == (input_, "tool_use")


def test_a_call_that_was_cut_off_has_no_arguments():
    found = message(calling('{"a":', "length"))
    assert (found.content[0].input, found.stop_reason) == ({}, "max_tokens")


@pytest.mark.parametrize(
    "arguments", ['{"a":', "[]", "nonsense", '"\ud800"', '{"a":' + "[" * 100_000]
)
def test_arguments_that_are_no_object_are_no_answer(arguments):
    with pytest.raises(BackendProtocolError):
        message(calling(arguments))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=8))
def test_the_pieces_make_the_whole(texts):
    events = play([Choice(delta=Delta(content=text)) for text in texts])
    deltas = [event.delta.text for event in events if event.type == "content_block_delta"]
    assert "".join(deltas) == "".join(texts)
    assert sum(event.type == "content_block_start" for event in events) == 1


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", "invalid_request_error"),
        (401, "invalid_api_key", "authentication_error"),
        (403, "forbidden", "permission_error"),
        (404, "model_not_found", "not_found_error"),
        (413, "request_too_large", "request_too_large"),
        (415, "unsupported_media_type", "invalid_request_error"),
        (429, "queue_full", "rate_limit_error"),
        (500, "internal_error", "api_error"),
        (502, "backend_died", "api_error"),
        (503, "model_loading", "overloaded_error"),
        (504, "deadline_exceeded", "timeout_error"),
        (507, "out_of_space", "api_error"),
    ],
)
def test_errors_by_status_and_inside_a_stream_by_code(status, code, kind):
    error = ErrorFields(message="no", type="x", param=None, code=code)
    for failure in (Failure(status=status, error=error), Failure(status=0, error=error)):
        body = json.loads(error_body(failure, "req_1"))
        assert body == {
            "type": "error",
            "error": {"type": kind, "message": "no"},
            "request_id": "req_1",
        }
        if kind != "request_too_large":  # which Anthropic's document has, and its types have not
            ErrorResponse.model_validate(body, strict=True)
    assert error_frame(Failure(status=0, error=error), "r").startswith(b"event: error\ndata: {")


def test_an_error_says_how_far_the_load_is():
    error = ErrorFields(message="no", type="x", param=None, code="model_loading")
    loading = read_answer(b'{"loading":{"bytes":1}}').loading
    assert json.loads(error_body(Failure(status=503, error=error, loading=loading), "r"))[
        "loading"
    ] == {"bytes": 1}
    assert b'"loading":{"bytes":1}' in typed_event(Ping(loading=loading or {}))
