"""Vectors in either encoding, whichever the engine gives."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.answers import Asked, Kind, Stamp, complete
from serverlessllm.testing.strict import check_whole

STAMP = Stamp("s", 1)
VECTORS = st.lists(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    min_size=1,
    max_size=3,
)


def packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def unpacked(text: str) -> list[float]:
    data = base64.b64decode(text)
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def ask(rows: list[Any], **asked: Any) -> Any:
    form = Asked(kind=Kind.EMBEDDINGS, model="m", **asked)
    body = json.dumps({"data": rows, "usage": {"prompt_tokens": 3}}).encode()
    done = complete(form, body, STAMP)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 0)
    return check_whole(form, done.body)


@given(VECTORS, st.booleans(), st.booleans())
def test_both_encodings(vectors: list[list[float]], given64: bool, asked64: bool) -> None:
    rows = [{"embedding": packed(each) if given64 else each} for each in vectors]
    answer = ask(rows, base64=asked64)
    assert [row["index"] for row in answer["data"]] == list(range(len(vectors)))
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    found = [row["embedding"] for row in answer["data"]]
    assert [unpacked(each) if asked64 else each for each in found] == vectors


@pytest.mark.parametrize("asked64", [True, False])
def test_a_shorter_vector_has_length_one_again(asked64: bool) -> None:
    answer = ask([{"embedding": [3.0, 4.0, 12.0]}], dimensions=2, base64=asked64)
    vector = answer["data"][0]["embedding"]
    vector = unpacked(vector) if asked64 else vector
    assert vector == pytest.approx([0.6, 0.8])


def test_the_asked_length_is_left_alone() -> None:
    assert ask([{"embedding": [3.0, 4.0]}], dimensions=2)["data"][0]["embedding"] == [3.0, 4.0]


def test_a_longer_vector_there_is_not() -> None:
    with pytest.raises(InvalidRequest, match="have 2") as raised:
        ask([{"embedding": [3.0, 4.0]}], dimensions=3)
    assert raised.value.param == "dimensions"
