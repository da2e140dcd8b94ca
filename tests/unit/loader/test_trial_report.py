"""The figures of a trial."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.loader.plan import ChunkRange
from serverlessllm.loader.trial.disk import rotated
from serverlessllm.loader.trial.reads import Reading, stripes
from serverlessllm.loader.trial.report import ladder

SAMPLES = st.lists(st.floats(0.001, 100), min_size=1, max_size=9)


def seconds(*steps: tuple[str, list[float]]) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in ladder(steps)}


def test_a_step_is_worth_what_it_adds():
    found = seconds(("read", [1, 9, 2]), ("verify", [3, 3, 3]), ("load", [4, 4, 8]))
    assert found == {"read": 2, "verify": 1, "load": 1}


def test_a_step_within_the_noise_is_worth_nothing():
    assert seconds(("read", [2]), ("verify", [1]), ("load", [3])) == {
        "read": 2,
        "verify": 0,
        "load": 1,
    }


@given(st.lists(SAMPLES, min_size=1, max_size=5))
def test_the_stages_add_up_to_the_load(samples):
    stages = ladder([(str(number), one) for number, one in enumerate(samples)])
    from statistics import median

    assert all(stage.seconds >= 0 for stage in stages)
    assert sum(stage.seconds for stage in stages) == pytest.approx(median(samples[-1]))


@given(st.integers(1, 10_000), st.integers(1, 700))
def test_stripes_cover_a_file_once(size_bytes, stripe_bytes):
    parts = stripes(size_bytes, stripe_bytes)
    assert parts[0] == ChunkRange(number=0, offset=0, size_bytes=min(size_bytes, stripe_bytes))
    ends = [part.offset + part.size_bytes for part in parts]
    assert [part.offset for part in parts[1:]] == ends[:-1]
    assert ends[-1] == size_bytes


def test_each_round_begins_with_another():
    async def one() -> None: ...
    async def two() -> None: ...

    works = (one, two)
    assert [tuple(rotated(works, number)) for number in range(3)] == [
        (one, two),
        (two, one),
        (one, two),
    ]


def test_a_reading_says_how():
    assert str(Reading(threads=1, block_bytes=1 << 20)) == "1 thread, blocks of 1.0 MiB"
    assert str(Reading(threads=4, block_bytes=2 << 20)) == "4 threads, blocks of 2.0 MiB"
