"""A chat's answer as a response: whole, and as typed events that OpenAI's own types accept."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serverlessllm.core.errors import BackendProtocolError
from serverlessllm.openai.chats import (
    ChatUsage,
    Choice,
    ChoiceLogprobs,
    Delta,
    Failure,
    TokenLogprob,
    TopLogprob,
    read_answer,
)
from serverlessllm.openai.errors import ErrorFields
from serverlessllm.openai.responses.answer import begun
from serverlessllm.openai.responses.assembly import Assembly
from serverlessllm.openai.responses.events import error_frame
from serverlessllm.openai.responses.request import parse_create
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.testing.dialects import call, told

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
USAGE = read_answer(
    b'{"usage":{"prompt_tokens":9,"completion_tokens":4,"prompt_tokens_details":'
    b'{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":1}}}'
).usage


def assembly(**fields):
    asked = {"model": "m", "input": "hi", **fields}
    create = parse_create(json.dumps(asked).encode(), RequestLimits(), "u")
    return Assembly(begun(create, "resp_u", 5), "u")


def play(made, choices, usage=USAGE):
    events = made.begin()
    for choice in choices:
        events += made.take(choice)
    found = told(events + made.end(usage, 7), EVENT)
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def types(events):
    return [event.type.removeprefix("response.") for event in events]


def test_a_text():
    events = play(
        assembly(),
        [
            Choice(delta=Delta(content="")),
            Choice(delta=Delta(content="four")),
            Choice(delta=Delta(content=".")),
            Choice(delta=Delta(), finish_reason="stop"),
        ],
    )
    assert types(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert events[0].response.status == "in_progress"
    response = events[-1].response
    assert (response.status, response.output_text) == ("completed", "four.")
    assert (response.created_at, response.completed_at) == (5, 7)
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert response.usage.output_tokens_details.reasoning_tokens == 1
    assert response.usage.total_tokens == 13


def test_a_thought_a_text_and_two_calls_are_four_items():
    events = play(
        assembly(),
        [
            Choice(delta=Delta(reasoning_content="Hm")),
            Choice(delta=Delta(reasoning_content=".")),
            Choice(delta=Delta(content="Let me see.")),
            call(0, name="find", call_id="c1"),
            call(0, arguments='{"a":'),
            call(0, arguments="1}"),
            call(1, name="find", arguments="{}", call_id="c2"),
            Choice(delta=Delta(), finish_reason="tool_calls"),
        ],
    )
    assert types(events)[2:7] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
    ]
    output = events[-1].response.output
    assert [item.type for item in output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert output[0].content[0].text == "Hm."
    assert (output[2].call_id, output[2].arguments) == ("c1", '{"a":1}')
    assert (output[3].call_id, output[3].arguments) == ("c2", "{}")
    assert len({item.id for item in output}) == 4
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.output_index for event in done] == [2, 3]


def test_a_refusal_is_a_part_of_its_message():
    events = play(
        assembly(),
        [
            Choice(delta=Delta(content="Sorry. ")),
            Choice(delta=Delta(refusal="No")),
            Choice(delta=Delta(refusal=".")),
        ],
    )
    (message,) = events[-1].response.output
    assert [part.type for part in message.content] == ["output_text", "refusal"]
    assert message.content[1].refusal == "No."
    assert {event.content_index for event in events if "refusal" in event.type} == {1}


@pytest.mark.parametrize(
    ("reason", "why"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_what_is_cut_off_is_incomplete(reason, why):
    events = play(assembly(), [Choice(delta=Delta(content="fo"), finish_reason=reason)])
    response = events[-1].response
    assert events[-1].type == "response.incomplete"
    assert (response.status, response.incomplete_details.reason) == ("incomplete", why)
    assert response.output[0].status == "incomplete"
    assert response.completed_at is None


def test_an_answer_of_nothing_is_an_empty_message():
    response = play(assembly(), [], usage=None)[-1].response
    assert response.output_text == ""
    assert response.output[0].content[0].text == ""
    assert response.usage.total_tokens == 0


def test_scores_come_with_the_pieces_and_with_the_whole():
    score = TokenLogprob(
        token="é", logprob=-0.5, top_logprobs=(TopLogprob(token="e", logprob=-1.5),)
    )
    logprobs = ChoiceLogprobs((score,))
    events = play(
        assembly(top_logprobs=1), [Choice(delta=Delta(content="é"), logprobs=logprobs)] * 2
    )
    (part,) = events[-1].response.output[0].content
    assert [found.bytes for found in part.logprobs] == [list("é".encode())] * 2
    assert part.logprobs[0].top_logprobs[0].bytes == [101]
    assert [len(event.logprobs) for event in events if event.type.endswith("text.delta")] == [1, 1]


def test_what_breaks_off_keeps_what_it_has():
    made = assembly()
    events = made.begin() + made.take(Choice(delta=Delta(content="fo")))
    error = ErrorFields(message="it died", type="server_error", param=None, code="backend_died")
    events += made.fail(Failure(status=0, error=error))
    last = told(events, EVENT)[-1]
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "server_error")
    assert last.response.output_text == "fo"
    assert last.response.output[0].status == "incomplete"


def test_a_load_is_told_as_progress_of_the_response():
    made = assembly()
    loading = read_answer(b'{"choices":[{}],"loading":{"state":"loading"}}').loading
    assert loading is not None
    events = told(made.begin() + made.wait(loading), EVENT)
    assert events[-1].type == "response.in_progress"
    assert events[-1].model_extra == {"loading": {"state": "loading"}}


def test_a_stream_that_never_began_ends_with_an_error():
    error = ErrorFields(message="no", type="server_error", param="model", code="load_failed")
    frame = error_frame(Failure(status=0, error=error)).decode()
    event = EVENT.validate_json(frame.split("data: ")[1], strict=True)
    assert (event.type, event.code, event.param) == ("error", "load_failed", "model")  # type: ignore[union-attr]
    assert json.loads(frame.split("data: ")[1])["error"]["message"] == "no"


def test_calls_that_are_mixed_up_are_no_answer():
    made = assembly()
    made.take(call(0, name="a", call_id="c1"))
    made.take(call(1, name="b", call_id="c2"))
    with pytest.raises(BackendProtocolError):
        made.take(call(0, arguments="{}"))


def test_what_was_asked_is_echoed():
    made = assembly(
        instructions="Be kind.",
        tools=[{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        metadata={"a": "b"},
        temperature=0.5,
        max_output_tokens=16,
        parallel_tool_calls=False,
        previous_response_id="resp_0",
        reasoning={"effort": "low"},
        store=False,
    )
    response = play(made, [])[-1].response
    assert response.tools[0].name == "f"
    assert response.tool_choice.name == "f"
    assert response.text.format.type == "json_schema"
    assert (response.metadata, response.temperature) == ({"a": "b"}, 0.5)
    assert (response.parallel_tool_calls, response.previous_response_id) == (False, "resp_0")
    assert response.reasoning.effort == "low"
    assert response.model_extra == {"store": False}


TEXTS = st.text(st.characters(codec="utf-8"), max_size=3)
PIECES = st.one_of(
    st.builds(lambda text: Delta(content=text), TEXTS),
    st.builds(lambda text: Delta(refusal=text), TEXTS),
    st.builds(lambda text: Delta(reasoning_content=text), TEXTS),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(PIECES, max_size=12))
def test_the_pieces_make_the_whole(pieces):
    events = play(assembly(), [Choice(delta=piece) for piece in pieces])
    response = events[-1].response
    assert [e.item for e in events if e.type == "response.output_item.done"] == response.output
    for kind, field in (("output_text", "content"), ("refusal", "refusal")):
        deltas = "".join(e.delta for e in events if e.type == f"response.{kind}.delta")
        assert deltas == "".join(getattr(piece, field) or "" for piece in pieces)
    assert response.output_text == "".join(piece.content or "" for piece in pieces)
    Response.model_validate_json(json.dumps(response.model_dump(mode="json")))


def test_a_whole_answer_is_one_big_piece():
    answer = read_answer(
        json.dumps(
            {
                "choices": [
                    {
                        "message": {
                            "role": "assistant",
                            "content": None,
                            "tool_calls": [
                                {
                                    "id": "c1",
                                    "type": "function",
                                    "function": {"name": "f", "arguments": "{}"},
                                },
                                {
                                    "id": "c2",
                                    "type": "function",
                                    "function": {"name": "g", "arguments": "{}"},
                                },
                            ],
                        },
                        "finish_reason": "tool_calls",
                    }
                ],
                "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
            }
        ).encode()
    )
    made = assembly()
    made.take(answer.choices[0])
    made.end(answer.usage, 7)
    assert [item.type for item in told(made.end(ChatUsage(), 7), EVENT)[-1].response.output] == [
        "function_call",
        "function_call",
    ]


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"choices":3}', b'{"choices":[{"delta":1}]}', b"\xff"]
)
def test_what_no_chat_answers_is_refused(data):
    with pytest.raises(BackendProtocolError):
        read_answer(data)
