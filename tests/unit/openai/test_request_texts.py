"""Prompts of completions and inputs of embeddings, and what stands beside them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request import ParsedRequest, parse_completion, parse_embeddings
from serverlessllm.openai.settings import RequestLimits

LIMITS = RequestLimits()
Parse = Callable[[bytes, RequestLimits], ParsedRequest]


def completion(**fields: object) -> bytes:
    return json.dumps({"model": "m", "prompt": "x"} | fields).encode()


def embeddings(**fields: object) -> bytes:
    return json.dumps({"model": "m", "input": "x"} | fields).encode()


@pytest.mark.parametrize(
    "prompt",
    [
        '"x"', '["x","y"]', "[1,2]", "[0, 2147483647]", "[[1],[2, 3]]", ' [ "x" ]', "[\n1\n]",
        '"' + "x" * 99 + '"', '["[1, 2"]', f'[{"1," * 200_000}1]',
    ],
    ids=lambda prompt: prompt[:20],
)  # fmt: skip
@pytest.mark.parametrize("parse", [parse_completion, parse_embeddings])
def test_prompts_and_inputs(parse: Parse, prompt: str) -> None:
    body = f'{{"model":"m","prompt":{prompt},"input":{prompt}}}'.encode()
    assert parse(body, LIMITS).model == "m"


@pytest.mark.parametrize(
    ("prompt", "where", "code"),
    [
        ("null", "", "invalid_type"),
        ("1", "", "invalid_type"),
        ("{}", "", "invalid_type"),
        ("true", "", "invalid_type"),
        ("[]", "", "empty_array"),
        ("[null]", "[0]", "invalid_type"),
        ("[{}]", "[0]", "invalid_type"),
        ("[true]", "[0]", "invalid_type"),
        ('["x",1]', "[1]", "invalid_type"),
        ('[1,"x"]', "[1]", "invalid_type"),
        ("[1,true]", "[1]", "invalid_type"),
        ("[1,2.5]", "[1]", "invalid_type"),
        ("[1e3]", "[0]", "invalid_type"),
        ("[-1]", "[0]", "integer_below_min_value"),
        ("[2147483648]", "[0]", "integer_above_max_value"),
        ("[9999999999999999999999999]", "[0]", "integer_above_max_value"),
        ("[[]]", "[0]", "empty_array"),
        ("[[1],2]", "[1]", "invalid_type"),
        ("[[1],[[2]]]", "[1][0]", "invalid_type"),
        ("[[1],[2,false]]", "[1][1]", "invalid_type"),
        ('["x"' + ',"x"' * 2048 + "]", "", "array_above_max_length"),
        ("[" + "[1]," * 2048 + "[1]]", "", "array_above_max_length"),
        ("[" + "1," * 300_000 + "1]", "", "array_above_max_length"),
        ("[" + " " * 100 + "1]", "[0]", "invalid_type"),
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("parse", [parse_completion, parse_embeddings])
def test_what_is_no_prompt(parse: Parse, prompt: str, where: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(f'{{"model":"m","prompt":{prompt},"input":{prompt}}}'.encode(), LIMITS)
    assert caught.value.param in {f"prompt{where}", f"input{where}"}
    assert caught.value.code == code


@pytest.mark.parametrize(("value", "where"), [("", ""), ([""], "[0]"), (["x", ""], "[1]")])
def test_a_prompt_may_be_empty_and_an_input_may_not(value: object, where: str) -> None:
    assert parse_completion(completion(prompt=value), LIMITS).model
    with pytest.raises(InvalidRequest) as caught:
        parse_embeddings(embeddings(input=value), LIMITS)
    assert caught.value.param == f"input{where}"
    assert caught.value.code == "string_below_min_length"


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True, "max_tokens": 0, "logprobs": 0},
        {"suffix": "end", "stop": "x", "user": "u", "seed": 1, "logit_bias": {"1": 2}},
        {"n": 2, "best_of": 3},
        {"best_of": 1, "stream": True, "stream_options": {"include_usage": True}},
        {"n": 2, "stream": True},
    ],
)
def test_completions_that_are_taken(fields: dict[str, object]) -> None:
    assert parse_completion(completion(**fields), LIMITS).model == "m"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 10**9}, "max_tokens", "integer_above_max_value"),
        ({"n": 3, "best_of": 2}, "best_of", "integer_below_min_value"),
        ({"best_of": 129}, "best_of", "integer_above_max_value"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_request"),
        ({"logprobs": 21}, "logprobs", "integer_above_max_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"echo": "yes"}, "echo", "invalid_type"),
        ({"suffix": 1}, "suffix", "invalid_type"),
        ({"stream_options": {}}, "stream_options", "invalid_request"),
    ],
)
def test_completions_that_are_refused(fields: dict[str, object], param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion(completion(**fields), LIMITS)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"dimensions": 0}, "dimensions", "integer_below_min_value"),
        ({"dimensions": 10**6}, "dimensions", "integer_above_max_value"),
        ({"dimensions": 1.5}, "dimensions", "invalid_type"),
    ],
)
def test_embeddings_that_are_refused(fields: dict[str, object], param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_embeddings(embeddings(**fields), LIMITS)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_encodings(encoding: str | None) -> None:
    assert parse_embeddings(embeddings(encoding_format=encoding, dimensions=8), LIMITS).model


def test_the_most_tokens_of_all_answers() -> None:
    body = completion(prompt=["a", "b"], n=2, best_of=3, max_tokens=5)
    assert parse_completion(body, LIMITS).answer_tokens_max == 2 * 3 * 5
    assert parse_completion(completion(), LIMITS).answer_tokens_max is None


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
prompts = leaves | st.lists(leaves | st.lists(leaves, max_size=3), max_size=3)


@given(prompts)
def test_a_prompt_is_taken_exactly_when_the_api_says_so(value: object) -> None:
    try:
        parse_completion(completion(prompt=value), LIMITS)
    except InvalidRequest:
        assert not _is_prompt(value)
    else:
        assert _is_prompt(value)


def _is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    if _are_ids(value) or all(isinstance(one, str) for one in value):
        return True
    return all(isinstance(one, list) and one and _are_ids(one) for one in value)


def _are_ids(values: list[object]) -> bool:
    return all(type(one) is int and 0 <= one < 2**31 for one in values)
