"""Whatever engines may say, in any combination and cut anywhere, comes out as the API says."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serverlessllm.core.errors import SLLMError
from serverlessllm.openai.answers import Asked, Kind, Stamp, StreamedAnswer, complete
from serverlessllm.testing.strict import check_chunks, check_stream, check_whole

STAMP = Stamp("s", 1)
TEXTS = st.text(max_size=6) | st.sampled_from(["", "Hi", "\\", '"', "é", "\U0001f600", "\n\n"])
MAYBE = st.none() | TEXTS
JUNK = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
COUNTS = st.integers(min_value=0, max_value=99) | st.none() | st.just(-1) | st.just("x")
REASONS = st.sampled_from(["stop", "length", "tool_calls", "eos", "STOP", "max_tokens", "zzz", ""])


def optional(**fields: Any) -> Any:
    return st.fixed_dictionaries({}, optional=fields)


LOGPROB = st.none() | st.floats(max_value=0, min_value=-99)
TOKEN = st.fixed_dictionaries(
    {"token": TEXTS},
    optional={
        "logprob": LOGPROB,
        "bytes": st.none() | st.lists(st.integers(0, 255), max_size=3),
        "id": JUNK,
        "top_logprobs": st.none()
        | st.lists(st.fixed_dictionaries({"token": TEXTS, "logprob": LOGPROB}), max_size=2),
    },
)
SCORES = st.none() | optional(
    content=st.none() | st.lists(TOKEN, max_size=2),
    refusal=st.none() | st.lists(TOKEN, max_size=1),
    tokens=st.none() | st.lists(TEXTS, max_size=2),
    token_logprobs=st.none() | st.lists(LOGPROB, max_size=3),
    top_logprobs=st.none() | st.lists(st.none() | st.dictionaries(TEXTS, LOGPROB, max_size=2)),
    text_offset=st.none() | st.lists(st.integers(0, 9), max_size=2),
)
ARGUMENTS = st.none() | TEXTS | st.dictionaries(TEXTS, JUNK, max_size=2)
CALL = optional(
    index=st.none() | st.integers(0, 2),
    id=MAYBE,
    type=JUNK,
    function=st.none() | optional(name=MAYBE, arguments=ARGUMENTS),
)
MESSAGE = optional(
    role=JUNK,
    content=MAYBE,
    reasoning_content=MAYBE,
    reasoning=MAYBE,
    refusal=MAYBE,
    tool_calls=st.none() | st.lists(CALL, max_size=3),
    function_call=st.none() | optional(name=MAYBE, arguments=ARGUMENTS),
    audio=JUNK,
    annotations=JUNK,
)
CHOICE = optional(
    index=st.none() | st.integers(0, 2),
    message=st.none() | MESSAGE,
    delta=st.none() | MESSAGE,
    text=MAYBE,
    finish_reason=st.none() | REASONS,
    logprobs=SCORES,
    stop_reason=st.none() | st.integers(-9, 9) | TEXTS,
    token_ids=st.none() | st.lists(st.integers(0, 9), max_size=2),
    prompt_logprobs=JUNK | st.lists(JUNK, max_size=2),
    matched_stop=JUNK,
)
USAGE = JUNK | optional(
    prompt_tokens=COUNTS,
    completion_tokens=COUNTS,
    total_tokens=COUNTS,
    prompt_tokens_details=JUNK | optional(cached_tokens=COUNTS),
    completion_tokens_details=JUNK | optional(reasoning_tokens=COUNTS),
)
ANSWER = st.fixed_dictionaries(
    {"choices": st.lists(CHOICE, max_size=3)},
    optional={
        "id": JUNK,
        "object": JUNK,
        "created": JUNK,
        "model": JUNK,
        "system_fingerprint": JUNK,
        "service_tier": JUNK | st.just("default"),
        "usage": USAGE,
        "timings": JUNK,
        "prompt_logprobs": JUNK | st.lists(JUNK, max_size=2),
    },
)
EVENTS = st.lists(
    ANSWER | st.sampled_from(["[DONE]", "", '{"error":"x"}', "nonsense"]), min_size=1, max_size=8
)
KIND = st.sampled_from([Kind.CHAT, Kind.TEXT])
relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=200)


@relaxed
@given(ANSWER, KIND, st.booleans())
def test_whole(answer: Any, kind: Kind, logprobs: bool) -> None:
    asked = Asked(kind=kind, model="asked", logprobs=logprobs)
    try:
        done = complete(asked, json.dumps(answer).encode(), STAMP)
    except SLLMError as error:
        assert error.status in {400, 502}  # noqa: PT017 - either outcome is one
        return
    check_whole(asked, done.body)


@relaxed
@given(
    EVENTS,
    KIND,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(min_value=0), max_size=30),
)
def test_streamed(
    events: list[Any],
    kind: Kind,
    logprobs: bool,
    include_usage: bool,
    end: str,
    places: list[int],
) -> None:
    asked = Asked(
        kind=kind, model="asked", stream=True, logprobs=logprobs, include_usage=include_usage
    )
    said = [each if isinstance(each, str) else json.dumps(each) for each in events]
    data = "".join(f"data: {each}{end}{end}" for each in said).encode()
    once = StreamedAnswer(asked, STAMP)
    whole = once.feed(data) + once.end()
    cut = StreamedAnswer(asked, STAMP)
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    pieces = [cut.feed(data[a:b]) for a, b in pairwise(edges)]
    assert b"".join(pieces) + cut.end() == whole
    assert (once.done, once.usage) == (cut.done, cut.usage)
    assert once.done is (once.error is None)
    found = [each.removeprefix("data: ") for each in whole.decode().split("\n\n") if each]
    if once.done:
        check_stream(asked, found)
    else:
        check_chunks(asked, [json.loads(each) for each in found])
