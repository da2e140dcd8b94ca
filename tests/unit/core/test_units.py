import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.units import (
    FOREVER_S,
    GIB,
    MIB,
    format_duration,
    format_size,
    parse_duration_s,
    parse_size_bytes,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("8GiB", 8 * GIB), ("512M", 512 * MIB), ("1.5 GB", 3 * GIB // 2), ("4096", 4096), (7, 7)],
)
def test_sizes_as_people_write_them(text, size_bytes):
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "8 XB", "1e9", -1])
def test_a_bad_size_says_how_to_write_one(text):
    with pytest.raises(ValueError, match="size"):
        parse_size_bytes(text)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (300, 300.0),
        (0, 0.0),
        (0.5, 0.5),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("250ms", 0.25),
        ("10", 10.0),
        (-1, FOREVER_S),
        ("-1", FOREVER_S),
        ("forever", FOREVER_S),
    ],
)
def test_durations_as_people_write_them(value, seconds):
    assert parse_duration_s(value) == seconds


@pytest.mark.parametrize(
    "value",
    ["", "5 minutes", "m", -2, -0.5, math.inf, math.nan, True, "5m x", "--1", 10**400, "9" * 400],
)
def test_a_bad_duration_says_how_to_write_one(value):
    with pytest.raises(ValueError, match="duration"):
        parse_duration_s(value)


def test_a_duration_of_megabytes_is_not_read():
    with pytest.raises(ValueError, match="duration") as caught:
        parse_duration_s("1s" * 1_000_000)
    assert len(str(caught.value)) < 200


@given(st.integers(min_value=0, max_value=2**60))
def test_a_formatted_size_reads_back_within_its_precision(size_bytes):
    assert parse_size_bytes(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06, abs=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "forever"),
        (0.85, "850 ms"),
        (12, "12.0 s"),
        (300, "5m00s"),
        (7500, "2h05m"),
        (47.9 * 3600, "47h54m"),
        (30 * 86400 - 1, "30d00h"),
        (2.5 * 86400, "2d12h"),
    ],
)
def test_durations_for_people(seconds, text):
    assert format_duration(seconds) == text
