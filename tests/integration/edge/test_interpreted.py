"""Where nothing could be compiled, the edge is the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SHOWN = (
    "import serverlessllm.edge.link as link, serverlessllm.orchestrator.router as router;"
    "print(link.__file__, router.__file__)"
)


def run(sources: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(sources), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


def test_the_sources_alone_pass_the_edges_tests(tmp_path: Path) -> None:
    sources = tmp_path / "src"
    shutil.copytree(ROOT / "src", sources, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    assert run(sources, "-c", SHOWN).split() == [
        str(sources / "serverlessllm" / "edge" / "link.py"),
        str(sources / "serverlessllm" / "orchestrator" / "router.py"),
    ]
    pytest = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    said = run(sources, *pytest, f"--basetemp={tmp_path / 'inner'}", "tests/unit/edge")
    assert " passed" in said
