"""Quantising as `sllm convert` does it: in a process of its own, into a folder beside the
destination that is gone afterwards, whatever happens."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

import msgspec

from serverlessllm.backends.inside.quantize.messages import (
    Advanced,
    Failed,
    Message,
    QuantizeRequest,
    Report,
)
from serverlessllm.cli.endings import end_signals
from serverlessllm.cli.failure import Failure

_MODULE = "serverlessllm.backends.inside.quantize"
_NEEDED = ("torch", "transformers", "compressed_tensors")
_ENVIRONMENT = {
    # Threads that wait for their turn on a busy machine sleep: measured with three neighbours on
    # two cores, 12 s of CPU instead of 59 s.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "300",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
_LOG_BYTES = 2000
"""Of what the process wrote to stderr before it died, at most."""


class WorkFolder(NamedTuple):
    """An empty folder that one run has to itself."""

    path: Path
    lock: int
    """A descriptor: whoever has it open keeps other runs out."""


def check_installed() -> None:
    """Refuse when a library is missing, before anything is read.

    Raises:
        Failure: names the way out.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise Failure(
            f"--quantize needs {missing[0]}, which is not installed",
            "pip install 'serverlessllm[torch]'",
        )


@contextmanager
def work_folder(destination: Path) -> Iterator[WorkFolder]:
    """An empty folder beside `destination`, on the same disk; removed on the way out.

    What a killed run has left in it goes first.

    Raises:
        Failure: another process works in it.
    """
    target = destination.resolve()
    folder = target.parent / f".{target.name}.quantizing"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"another process is quantising to {destination}") from None
        inner = folder / "folder"
        shutil.rmtree(inner, ignore_errors=True)
        inner.mkdir()
        try:
            yield WorkFolder(inner, lock)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def quantize(request: QuantizeRequest, lock: int, on_advance: Callable[[Advanced], None]) -> Report:
    """Run the process until it has written `request.work`; it never outlives this call.

    It holds the folder's `lock` too: when we are killed, the next run starts after its end.

    Raises:
        Failure: the source cannot be quantised, or the process died; says which and why.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, msgspec.json.encode(request).decode()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=[lock],
            env=os.environ | _ENVIRONMENT,
        )
        with process:
            try:
                answer = _listen(process.stdout, on_advance)
            finally:
                process.kill()
        if isinstance(answer, Report):
            return answer
        if isinstance(answer, Failed):
            raise Failure(answer.message)
        log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_BYTES))
        said = log.read().decode(errors="replace").strip()
        raise Failure(
            "the quantising process died" + (f":\n{said}" if said else ""),
            "if the machine ran out of memory, use one with more",
        )


def _listen(
    lines: IO[bytes] | None, on_advance: Callable[[Advanced], None]
) -> Report | Failed | None:
    """The process's last word; None when it ended without one."""
    assert lines is not None
    for line in lines:
        message: Message = msgspec.json.decode(line, type=Message)
        if not isinstance(message, Advanced):
            return message
        on_advance(message)
    return None


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal to end ends what runs inside as Ctrl-C does: what has to be removed is."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in end_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
