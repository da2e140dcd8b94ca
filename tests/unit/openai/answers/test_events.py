"""Server-sent events, cut anywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.openai.answers.events import EVENT_BYTES_MAX, EventReader


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(
    st.lists(st.lists(st.text("ab:{} ", max_size=5), min_size=1, max_size=3), max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(min_value=0), max_size=20),
    st.sampled_from(["", ": hello", ":", "id: 7", "retry: 3", "event: x"]),
)
def test_however_it_is_cut(
    events: list[list[str]], end: str, places: list[int], between: str
) -> None:
    text = "".join(
        between + end + "".join(f"data: {line}{end}" for line in lines) + end for lines in events
    )
    reader = EventReader()
    found = [data for piece in cut(text.encode(), places) for data in reader.feed(piece)]
    assert found == ["\n".join(lines).encode() for lines in events]
    assert not reader.too_long


def test_no_space_and_a_mark_at_the_beginning() -> None:
    assert EventReader().feed(b"\xef\xbb\xbfdata:x\n\n") == [b"x"]


@pytest.mark.parametrize("size", [1000, 70_000, EVENT_BYTES_MAX * 2])
def test_an_event_has_a_bound(size: int) -> None:
    reader = EventReader()
    data = b"data: " + b"x" * (EVENT_BYTES_MAX + 10)
    for at in range(0, len(data), size):
        assert reader.feed(data[at : at + size]) == []
    assert reader.too_long


def test_the_bound_counts_all_its_lines() -> None:
    reader = EventReader()
    line = b"data: " + b"x" * 100_000 + b"\n"
    for _ in range(10):
        reader.feed(line)
    assert not reader.too_long
    reader.feed(line)
    assert reader.too_long


def test_many_events_are_no_long_event() -> None:
    reader = EventReader()
    event = b"data: " + b"x" * 1000 + b"\n\n"
    found = reader.feed(event * 2000) + reader.feed(event)
    assert len(found) == 2001
    assert not reader.too_long
