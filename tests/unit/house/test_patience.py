"""Tests wait for what happens: none sleeps until it may have happened, none times it."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = (ROOT / "tests", ROOT / "src" / "serverlessllm" / "testing")
PASSING_TIME = {"asyncio": {"sleep"}, "anyio": {"sleep"}}
PASSING_TIME["time"] = {
    *("sleep", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"),
    *("process_time", "process_time_ns", "thread_time", "thread_time_ns", "time", "time_ns"),
}
ALLOWED = {
    "src/serverlessllm/testing/waiting.py": "waits for everybody, between two looks",
    "src/serverlessllm/testing/contracts/backend.py": "an engine that must not be looked at often",
    "src/serverlessllm/testing/hub.py": "a hub that is slow",
    "tests/integration/orchestrator/test_hostile.py": "clients that are slow",
    "tests/integration/orchestrator/test_hostile_stalls.py": "CPU time between two turns of a loop",
    "tests/unit/backends/test_process.py": "spends CPU time, which is what is counted there",
    "tests/unit/openai/test_request.py": "CPU time that holds up a loop",
}
"""Where time is passed or read, and why."""


def modules() -> Iterator[Path]:
    for top in FOLDERS:
        for folder, inside, names in os.walk(top):
            inside[:] = [name for name in inside if name != "node_modules"]
            yield from (Path(folder, name) for name in names if name.endswith(".py"))


def passes_time(source: str) -> bool:
    """Whether it calls or imports what sleeps or tells the time; giving way once is no sleep."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = PASSING_TIME.get(node.module or "", set())
            if any(each.name in names for each in node.names):
                return True
        if isinstance(node, ast.Call) and not gives_way(node):
            owner, _, name = ast.unparse(node.func).partition(".")
            if name in PASSING_TIME.get(owner, set()):
                return True
    return False


def gives_way(call: ast.Call) -> bool:
    match call.args:
        case [ast.Constant(value=0)]:
            return True
    return False


def test_no_test_sleeps_or_reads_a_clock_but_those_that_have_to() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in modules()
        if passes_time(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED), "wait by serverlessllm.testing.waiting, or say here why not"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("await asyncio.sleep(0)", False),
        ("await asyncio.sleep(0.1)", True),
        ("await clock.sleep(1)", False),
        ("time.sleep(n)", True),
        ("from time import sleep", True),
        ("from asyncio import TaskGroup", False),
        ("assert time.monotonic() < 1", True),
    ],
)
def test_what_passes_time_is_seen(source: str, found: bool) -> None:
    assert passes_time(source) is found
