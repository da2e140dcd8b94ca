"""What real engines sent (`corpus/llamacpp.json`), and what others are known to send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from serverlessllm.openai.answers import (
    KINDS,
    Asked,
    Stamp,
    StreamedAnswer,
    complete,
    read_asked,
)
from serverlessllm.testing.strict import check_stream, check_whole

CORPUS = Path(__file__).with_name("corpus")
STAMP = Stamp("stamped", 1_700_000_000)


def samples() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in CORPUS.glob("*.json"):
        found |= {
            f"{path.stem}:{name}": each for name, each in json.loads(path.read_text()).items()
        }
    return found


SAMPLES = samples()


def read(name: str) -> tuple[Asked, bytes]:
    sample = SAMPLES[name]
    kind = KINDS[sample["path"]]
    return read_asked(kind, msgspec.json.encode(sample["ask"])), sample["answer"].encode()


def events(data: bytes) -> list[str]:
    return [event.removeprefix("data: ") for event in data.decode().split("\n\n") if event]


def streamed(name: str) -> list[Any]:
    asked, data = read(name)
    answer = StreamedAnswer(asked, STAMP)
    said = answer.feed(data) + answer.end()
    assert answer.error is None
    return check_stream(asked, events(said))


def whole(name: str) -> Any:
    asked, data = read(name)
    return check_whole(asked, complete(asked, data, STAMP).body)


@pytest.mark.parametrize("name", [n for n in SAMPLES if SAMPLES[n]["ask"].get("stream")])
@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_streams(name: str, size: int) -> None:
    asked, data = read(name)
    answer = StreamedAnswer(asked, STAMP)
    pieces = [answer.feed(data[at : at + size]) for at in range(0, len(data), size)]
    assert all(not piece or piece.endswith(b"\n\n") for piece in pieces)
    chunks = check_stream(asked, events(b"".join(pieces) + answer.end()))
    assert answer.done
    assert answer.error is None
    if asked.include_usage:
        assert answer.usage is not None
        assert chunks[-1]["usage"]["completion_tokens"] == answer.usage.completion_tokens


@pytest.mark.parametrize("name", [n for n in SAMPLES if not SAMPLES[n]["ask"].get("stream")])
def test_whole_answers(name: str) -> None:
    asked, data = read(name)
    check_whole(asked, complete(asked, data, STAMP).body)


def test_reasoning_is_kept_and_an_empty_list_of_calls_is_not() -> None:
    message = whole("others:vllm_chat")["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "\n\nFour.",
        "refusal": None,
        "reasoning_content": "Two and two.",
    }


def test_a_call_leaves_no_content_and_the_stop_reason_is_kept() -> None:
    choice = whole("others:vllm_tools")["choices"][0]
    assert choice["message"]["content"] is None
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", 128008)


def test_a_streamed_call_has_one_id_and_one_name() -> None:
    calls = [
        call
        for chunk in streamed("others:vllm_stream_tools")
        for choice in chunk["choices"]
        for call in choice["delta"].get("tool_calls", ())
    ]
    assert calls[0] == {
        "function": {"name": "get_weather", "arguments": ""},
        "index": 0,
        "id": "chatcmpl-tool-a",
        "type": "function",
    }
    assert all(call.keys() == {"index", "function"} for call in calls[1:])
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "Paris"}


def test_two_calls_of_one_number_are_two() -> None:
    chunks = streamed("others:ollama_tools")
    first = chunks[0]["choices"][0]["delta"]
    assert [(call["index"], call["id"]) for call in first["tool_calls"]] == [
        (0, "call_x"),
        (1, "call_y"),
    ]
    assert json.loads(first["tool_calls"][0]["function"]["arguments"]) == {"k": 1}
    assert (first["content"], first["reasoning_content"]) == (None, "Call.")
    # A call without arguments has none, in JSON.
    assert chunks[1]["choices"][0]["delta"]["tool_calls"] == [
        {"index": 1, "function": {"arguments": "{}"}}
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_end_is_a_chunk_of_its_own() -> None:
    *_, text, last, usage = streamed("others:tgi_stream")
    assert text["choices"][0]["delta"] == {"content": " learning"}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["total_tokens"] == 3
    assert text["id"] == "chatcmpl-stamped"


def test_reasoning_tokens_are_found_wherever_they_are() -> None:
    usage = streamed("others:sglang_stream")[-1]["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 1


def test_what_comes_before_the_first_choice_names_nothing() -> None:
    chunk = streamed("others:azure_like_stream")[0]
    assert (chunk["id"], chunk["service_tier"]) == ("chatcmpl-6", "default")


def test_llama_cpps_log_probabilities_of_a_completion_get_the_completions_shape() -> None:
    chunks = streamed("llamacpp:text_stream_logprobs")
    scores = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    offsets = [offset for each in scores if each for offset in each["text_offset"]]
    assert offsets == [0, 3, 9, 10]


def test_llama_cpps_names() -> None:
    answer = whole("llamacpp:text")
    assert answer["id"].startswith("cmpl-")
    assert "timings" not in answer


def test_a_first_tokens_missing_log_probability_is_a_number() -> None:
    scores = whole("others:vllm_text")["choices"][0]["logprobs"]
    assert scores["token_logprobs"] == [0.0, -0.5]
    assert scores["top_logprobs"] == [{}, {" b": -0.5}]


def test_hardly_anything_is_enough() -> None:
    answer = whole("others:bare_text")
    assert answer == {
        "id": "cmpl-stamped",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "m",
        "system_fingerprint": None,
        "choices": [{"text": "b", "index": 0, "logprobs": None, "finish_reason": "stop"}],
    }


def test_what_is_kept_of_a_prompt_is_kept_as_it_is() -> None:
    scores = [None, {"5": {"logprob": -1.5, "rank": 1, "decoded_token": " b"}}]
    said = {"choices": [{"text": "b", "prompt_logprobs": scores, "token_ids": [5]}]}
    asked = read_asked(KINDS["/v1/completions"], b'{"model":"m","prompt":"a b"}')
    choice = check_whole(asked, complete(asked, json.dumps(said).encode(), STAMP).body)["choices"]
    assert (choice[0]["prompt_logprobs"], choice[0]["token_ids"]) == (scores, [5])


@pytest.mark.parametrize("usage", [None, 7, [], {}, {"prompt_tokens": -1}, {"total_tokens": 1e300}])
def test_an_engine_that_counts_nothing_is_not_made_to(usage: object) -> None:
    asked = read_asked(KINDS["/v1/completions"], b'{"model":"m","prompt":"a"}')
    said = {"choices": [{"text": "b"}], "usage": usage}
    done = complete(asked, json.dumps(said).encode(), STAMP)
    assert done.usage is None
    assert "usage" not in check_whole(asked, done.body)
