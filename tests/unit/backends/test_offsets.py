"""Where tokens stand in their text."""

from __future__ import annotations

import pytest

from serverlessllm.backends.offsets import token_offsets


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("one two", ["one", " two"], [0, 3]),
        ("one two", ["<s>", " one", " two"], [0, 0, 3]),
        ("one", ["<s>", "", "\N{REPLACEMENT CHARACTER}", "o", "ne"], [0, 0, 0, 0, 1]),
        ("a \N{BLACK HEART SUIT} b", ["a", " ", *["\N{REPLACEMENT CHARACTER}"] * 3, " b"],
         [0, 1, 2, 2, 2, 4]),
        ("", [], []),
        ("x", ["y", "x"], [0, 0]),
    ],
)  # fmt: skip
def test_offsets(text: str, tokens: list[str], offsets: list[int]) -> None:
    assert token_offsets(text, tokens, 0) == offsets
    assert token_offsets(text, tokens, 5) == [offset + 5 for offset in offsets]
