"""The converter in a process of its own, which may be starved or measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

RunConverter = Callable[..., "subprocess.CompletedProcess[str]"]

_SCRIPT = """
import resource, sys, threading
from pathlib import Path
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.errors import SLLMError

source, out, chunk_bytes, data_bytes_max = sys.argv[1:]
if int(data_bytes_max):
    threading.stack_size(1 << 20)  # the limit counts what a stack may become, 8 MiB each
    resource.setrlimit(resource.RLIMIT_DATA, (int(data_bytes_max),) * 2)
try:
    convert(open_folder(Path(source), model="test/model"), Path(out), chunk_bytes=int(chunk_bytes))
except SLLMError as error:
    sys.exit(f"{error.code}: {error.message}")
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.fixture
def run_converter() -> RunConverter:
    """Run it; `wrapper` is put before the command.

    `data_bytes_max` is all the memory it may take for itself, of whatever kind (RLIMIT_DATA). The
    first line of its stdout is how many KiB it had resident at most; of its stderr the code and
    message of an error.
    """

    def run(
        source: Path,
        out: Path,
        *,
        chunk_bytes: int = 16 << 20,
        data_bytes_max: int = 0,
        wrapper: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _SCRIPT, str(source), str(out)]
        numbers = (chunk_bytes, data_bytes_max)
        return subprocess.run(
            [*wrapper, *command, *map(str, numbers)], capture_output=True, text=True, timeout=300
        )

    return run
