"""The token that was chosen stands among its alternatives, in whichever shape they come."""

from __future__ import annotations

import msgspec

from serverlessllm.openai.answers.scores import Scores, text_scores


def top(**said: object) -> list[dict[str, float]]:
    scores = text_scores(msgspec.convert(said, Scores), 0)
    assert scores is not None
    return scores.top_logprobs


def test_an_unlikely_token_is_told_beside_the_likely_ones() -> None:
    lists = top(tokens=["a", "b"], token_logprobs=[-9.0, -1.0], top_logprobs=[{"x": -0.5}] * 2)
    assert lists == [{"x": -0.5, "a": -9.0}, {"x": -0.5, "b": -1.0}]
    alternative = {"token": "x", "logprob": -0.5}
    content = [{"token": "a", "logprob": -9.0, "top_logprobs": [alternative]}]
    assert top(content=content) == [{"x": -0.5, "a": -9.0}]


def test_a_likely_token_is_told_once() -> None:
    told = [{"a": -0.25, "x": -2.0}]
    assert top(tokens=["a"], token_logprobs=[-0.25], top_logprobs=told) == told


def test_nothing_is_added_where_no_alternatives_are_told() -> None:
    assert top(tokens=["a", "b"], token_logprobs=[None, -1.0], top_logprobs=[None, {}]) == [{}, {}]
    assert top(content=[{"token": "a", "logprob": -1.0}]) == [{}]
