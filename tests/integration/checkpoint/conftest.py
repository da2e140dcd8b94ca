"""The converter in a process of its own, which may be killed, starved or measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

RunConverter = Callable[..., "subprocess.CompletedProcess[str]"]

_SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.errors import SLLMError

source, out, chunk_bytes, kill_at_chunk, kill_at_call = sys.argv[1:]
calls = 0

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def count_calls(event, arguments):
    global calls
    if event in {"os.rename", "os.remove", "os.truncate"} or (
        event == "open" and str(arguments[0]).startswith(out)
    ):
        calls += 1
        if calls == int(kill_at_call):
            kill()

def on_chunk(chunk):
    if chunk.number == int(kill_at_chunk):
        kill()

sys.addaudithook(count_calls)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    raw = open_folder(Path(source), model="test/model")
    done = convert(raw, Path(out), on_chunk=on_chunk, chunk_bytes=int(chunk_bytes))
except SLLMError as error:
    sys.exit(f"{error.code}: {error.message}")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def run_converter() -> RunConverter:
    """Run it: `kill_at_chunk` after that chunk, `kill_at_call` before the n-th change of a name.

    `wrapper` is put before the command. The last line of its stdout is how many KiB its memory
    grew at most; of its stderr the code and message of an error.
    """

    def run(
        source: Path,
        out: Path,
        *,
        chunk_bytes: int = 16 << 20,
        kill_at_chunk: int = -1,
        kill_at_call: int = -1,
        wrapper: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _SCRIPT, str(source), str(out)]
        numbers = (chunk_bytes, kill_at_chunk, kill_at_call)
        return subprocess.run(
            [*wrapper, *command, *map(str, numbers)], capture_output=True, text=True, timeout=60
        )

    return run
