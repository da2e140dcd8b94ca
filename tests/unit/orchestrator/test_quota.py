"""Limits by the minute, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.apikeys import ApiKey
from serverlessllm.core.ids import KeyId
from serverlessllm.orchestrator.rest.quota import (
    Bucket,
    Quotas,
    RequestsLimited,
    TokensLimited,
    reset,
    tokens_used,
)
from serverlessllm.testing.clock import VirtualClock


def key(name: str = "one", **limits: Any) -> ApiKey:
    return ApiKey(id=KeyId(name), name=name, sha256="0" * 64, **limits)


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def quotas(clock):
    return Quotas(clock)


def read_lines(usage, clock):
    return dict(
        line.split(": ") for line in usage.lines(clock.now_s()).decode().split("\r\n") if line
    )


async def test_requests_come_back_evenly(quotas, clock):
    usage = quotas.of(key(requests_per_minute=2))
    for _ in range(2):
        usage.admit(0, None).close(answered=True)
    with pytest.raises(RequestsLimited) as refused:
        usage.admit(0, None)
    error = refused.value
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "requests")
    assert error.retry_after_s == pytest.approx(30)
    await clock.advance(30)
    usage.admit(0, None)
    with pytest.raises(RequestsLimited):
        usage.admit(0, None)


async def test_tokens_are_reserved_and_corrected(quotas, clock):
    usage = quotas.of(key(tokens_per_minute=1000))
    admission = usage.admit(400, 500)
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "400"
    with pytest.raises(TokensLimited) as refused:
        usage.admit(4000, None)
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "tokens")
    assert refused.value.retry_after_s == pytest.approx(36)
    admission.settle(50)
    admission.close(answered=True)
    assert read_lines(usage, clock) == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "950",
        "x-ratelimit-reset-tokens": "3s",
    }
    await clock.advance(600)
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "1000"
    assert read_lines(usage, clock)["x-ratelimit-reset-tokens"] == "0ms"


async def test_what_was_used_beyond_the_estimate_is_owed(quotas, clock):
    usage = quotas.of(key(tokens_per_minute=60))
    with usage.admit(40, None) as admission:
        admission.settle(120)
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(TokensLimited) as refused:
        usage.admit(4, None)
    assert refused.value.retry_after_s == pytest.approx(61)
    await clock.advance(61)
    usage.admit(4, None)


async def test_a_request_larger_than_a_minute_is_admitted_when_nothing_else_was(quotas, clock):
    usage = quotas.of(key(tokens_per_minute=100))
    usage.admit(4, 10**9).close(answered=True)
    with pytest.raises(TokensLimited):
        usage.admit(4, None)
    await clock.advance(60)
    usage.admit(4, 10**9)


def test_a_request_that_was_not_answered_used_no_tokens(quotas, clock):
    usage = quotas.of(key(requests_per_minute=5, tokens_per_minute=100))
    admission = usage.admit(4, 99)
    admission.close(answered=False)
    admission.close(answered=True)
    said = read_lines(usage, clock)
    assert said["x-ratelimit-remaining-tokens"] == "100"
    assert said["x-ratelimit-remaining-requests"] == "4"
    with pytest.raises(ZeroDivisionError), usage.admit(4, 99):
        raise ZeroDivisionError
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "100"
    assert usage.running == 0


def test_a_stream_that_broke_off_is_charged_by_its_bytes(quotas, clock):
    usage = quotas.of(key(tokens_per_minute=1000))
    admission = usage.admit(40, None)
    admission.broke_off(25_600)
    admission.close(answered=True)
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "890"


def test_a_stream_that_broke_off_is_not_charged_for_what_it_might_have_said(quotas, clock):
    usage = quotas.of(key(tokens_per_minute=1000))
    admission = usage.admit(40, 900)
    admission.broke_off(2560)
    admission.close(answered=True)
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "980"


async def test_what_a_long_answer_used_is_charged_when_it_ends(quotas, clock):
    usage = quotas.of(key(tokens_per_minute=1000))
    with usage.admit(40, None) as admission:
        await clock.advance(60)  # nothing can come back to a bucket that is full
        admission.settle(900)
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "110"
    with usage.admit(0, 100) as admission:
        await clock.advance(60)
        admission.settle(0)
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "1000"


async def test_what_others_spent_is_charged_to_a_bucket_nobody_looked_at(quotas, clock):
    usage = quotas.of(key(requests_per_minute=60, tokens_per_minute=600))
    await clock.advance(600)
    quotas.note_others({KeyId("one"): (60, 600)})
    with pytest.raises(RequestsLimited):
        usage.admit(0, None)
    assert read_lines(usage, clock)["x-ratelimit-remaining-tokens"] == "0"


def test_requests_at_once(quotas, clock):
    usage = quotas.of(key(requests_at_once=2))
    first, _ = usage.admit(0, None), usage.admit(0, None)
    with pytest.raises(RequestsLimited, match="at once"):
        usage.admit(0, None)
    first.close(answered=True)
    first.close(answered=True)
    usage.admit(0, None)
    with pytest.raises(RequestsLimited):
        usage.admit(0, None)
    assert usage.lines(clock.now_s()) == b""


def test_a_key_without_limits_is_not_counted(quotas):
    assert quotas.of(key()) is None
    assert quotas.of(key(requests_at_once=1)) is not None
    equal = key(requests_per_minute=7, tokens_per_minute=7, requests_at_once=7)
    assert quotas.of(equal) is not None


def test_usage_begins_anew_only_when_the_key_changes(quotas):
    one = quotas.of(key(requests_per_minute=5))
    assert quotas.of(key(requests_per_minute=5)) is one
    assert quotas.of(key(requests_per_minute=6)) is not one
    quotas.keep_only({})
    assert quotas.of(key(requests_per_minute=6)) is not one


def test_processes_tell_each_other_what_was_spent(clock):
    here, there = Quotas(clock), Quotas(clock)
    limited = key(requests_per_minute=10, tokens_per_minute=1000)
    mine, theirs = here.of(limited), there.of(limited)
    assert mine is not None
    assert theirs is not None
    for _ in range(3):
        with mine.admit(40, None) as admission:
            admission.settle(100)
    spent = here.spent_since()
    assert spent == {"one": (3, 300)}
    assert here.spent_since() == {}
    there.note_others({**spent, KeyId("unknown"): (1, 1)})
    assert read_lines(theirs, clock)["x-ratelimit-remaining-requests"] == "7"
    assert read_lines(theirs, clock)["x-ratelimit-remaining-tokens"] == "700"
    assert there.spent_since() == {}  # what is the others' is not told again
    with mine.admit(40, None) as admission:
        admission.settle(5)
    assert here.spent_since() == {"one": (1, 5)}


async def test_a_process_that_begins_hears_what_was_spent_before(clock):
    here, there = Quotas(clock), Quotas(clock)
    limited = key(requests_per_minute=10, tokens_per_minute=1000)
    mine, theirs = here.of(limited), there.of(limited)
    assert mine is not None
    assert theirs is not None
    assert here.missing() == {}
    here.note_others({KeyId("one"): (4, 300)})
    with mine.admit(40, None) as admission:
        admission.settle(100)
    assert here.missing() == {"one": (4, 300)}  # and the rest is still to be told
    there.note_others(here.missing())
    there.note_others(here.spent_since())
    assert read_lines(theirs, clock) == read_lines(mine, clock)
    assert read_lines(theirs, clock)["x-ratelimit-remaining-tokens"] == "600"
    await clock.advance(60)
    assert here.missing() == {}


@given(
    st.integers(1, 10**6),
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 2000)), max_size=30),
)
def test_no_more_than_the_limit_in_a_minute_beside_one_burst(per_minute, steps):
    now_s, taken = 0.0, 0
    bucket = Bucket("tokens", per_minute, now_s)
    for pause_s, units in steps:
        now_s += pause_s
        if bucket.look(now_s) >= units:
            bucket.left -= units
            taken += units
        assert taken <= per_minute * (1 + now_s / 60) + 1e-6
        assert bucket.left <= per_minute


@pytest.mark.parametrize(
    ("head", "trailers", "used"),
    [
        (b"HTTP/1.1 200 OK\r\nx-sllm-usage: 7 12\r\na: b\r\n\r\n", b"", (7, 12)),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x-sllm-usage: 7 0\r\n", (7, 0)),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"a: b\r\nx-sllm-usage: 1 2\r\n", (1, 2)),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"", None),
        (b"HTTP/1.1 200 OK\r\nx-sllm-usage: 7\r\n\r\n", b"", None),
        (b"HTTP/1.1 200 OK\r\nx-sllm-usage: -7 1\r\n\r\n", b"", None),
        (b"HTTP/1.1 200 OK\r\nx-sllm-usage: many 1\r\n\r\n", b"", None),
    ],
)
def test_what_an_agent_says_of_tokens(head, trailers, used):
    assert tokens_used(head, trailers) == used


def test_durations_as_openai_writes_them():
    said = [reset(s) for s in (0, 0.0172, 0.999, 1, 1.2, 59.1, 360, 3601)]
    assert said == ["0ms", "18ms", "999ms", "1s", "2s", "1m0s", "6m0s", "60m1s"]
