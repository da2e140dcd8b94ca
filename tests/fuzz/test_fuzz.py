"""A short run of every target, from its corpus; `scripts/fuzz.sh` is the long one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUNS = 5_000
TARGETS = sorted(folder.name for folder in (HERE / "corpus").iterdir())

PLANTED = """
import sys
sys.path.insert(0, {here!r})
from bounded import Bounded, limit_memory
Bounded({target})(b"")
"""


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found(target: str, tmp_path: Path) -> None:
    corpus = shutil.copytree(HERE / "corpus" / target, tmp_path / "corpus")
    run = subprocess.run(
        [
            sys.executable,
            str(HERE / "fuzz.py"),
            target,
            f"-runs={RUNS}",
            "-seed=1",
            "-max_len=4096",
            # libFuzzer's own limit reads a peak that a process inherits from its parent, which may
            # hold an engine here; `bounded` limits what the target itself takes.
            "-rss_limit_mb=0",
            str(corpus),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert f"Done {RUNS} runs" in run.stderr


@pytest.mark.parametrize(
    ("target", "finding"),
    [
        ("lambda data: [][0]", "IndexError"),
        ("lambda data: bytearray(100 << 20)", "MemoryError"),
        ("lambda data: [x for x in iter(int, 1) if x]", "TooSlow"),
    ],
)
def test_what_breaks_a_bound_is_a_finding(target: str, finding: str) -> None:
    script = PLANTED.format(here=str(HERE), target=target)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(
        finding if finding != "TooSlow" else "bounded.TooSlow"
    )


def test_every_target_has_a_corpus() -> None:
    listed = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py")], capture_output=True, text=True
    ).stderr
    names = listed.partition("{")[2].partition("}")[0].split(",")
    assert sorted(names) == TARGETS
