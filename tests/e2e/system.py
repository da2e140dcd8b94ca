"""Run a verb of `sllm` to its end, as a shell would."""

from __future__ import annotations

import os
import subprocess
import sys


def run(
    *arguments: str, url: str | None = None, stdin: str = "", timeout_s: float = 90
) -> subprocess.CompletedProcess[str]:
    """What `sllm ARGUMENTS` prints and returns; nothing of the caller's settings reaches it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLLM_")}
    environment = kept | ({"SLLM_URL": url} if url else {})
    return subprocess.run(
        [sys.executable, "-m", "serverlessllm.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        input=stdin,
        timeout=timeout_s,
    )
