"""Where the time went: the arithmetic of the demo's table."""

from __future__ import annotations

import pytest

from serverlessllm.cli.demo import Answer, waterfall
from serverlessllm.cli.waterfall import hop_rows, parse_server_timing, stage_of
from serverlessllm.core.agentapi import HopTiming


@pytest.mark.parametrize(
    ("header", "stages"),
    [
        ("queue;dur=0.1, place;dur=2", {"queue": 0.1, "place": 2.0}),
        ('fetch;desc="x";dur=12.5', {"fetch": 12.5}),
        ("read ; dur=3", {"read": 3.0}),
        ("cached", {}),
        ("", {}),
    ],
)
def test_server_timing_is_read(header, stages):
    assert parse_server_timing(header) == stages


def test_a_hop_shows_rate_and_share_of_its_limit():
    hop = HopTiming(hop="nvme→dram", bytes_moved=2**20, seconds=0.5, limit_bytes_s=2**22)
    assert hop_rows([hop]) == [("nvme→dram", "500.0", "1.0 MiB", "2.0 MiB/s", "50%")]
    assert hop_rows([HopTiming(hop="start", seconds=1)]) == [("start", "1000.0", "-", "-", "-")]
    assert hop_rows([HopTiming(hop="x", bytes_moved=5, seconds=0)])[0][3:] == ("-", "-")


@pytest.mark.parametrize(
    ("hop", "stage"),
    [
        ("queue", "queue"),
        ("store→nvme", "fetch"),
        ("store→dram", "fetch"),
        ("nvme→dram", "read"),
        ("dram→device", "read"),
        ("start", "start"),
    ],
)
def test_each_hop_belongs_to_a_stage(hop, stage):
    assert stage_of(hop) == stage


def test_the_rows_of_a_waterfall_add_up_to_the_first_token():
    answer = Answer(
        text="4", first_token_s=1.0, total_s=2.0, server_timing_ms={"queue": 10, "place": 20}
    )
    hops = (
        HopTiming(hop="store→dram", bytes_moved=1000, seconds=0.1),
        HopTiming(hop="start", seconds=0.5),
    )
    rows = waterfall(answer, hops)
    assert [row[0] for row in rows] == [
        *("queue", "place", "fetch store→dram", "read", "start", "first token", "= to first token")
    ]
    *parts, whole = (float(row[1]) for row in rows)
    assert sum(parts) == pytest.approx(whole) == 1000.0


def test_a_hot_answer_moves_nothing():
    answer = Answer(text="4", first_token_s=0.02, total_s=0.1, server_timing_ms={"place": 0.5})
    assert {row[2] for row in waterfall(answer, ())} == {"-"}
