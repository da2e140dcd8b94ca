"""Conversions killed at their n-th change of the disk, for each n: a program of one thread.

    killing.py SOURCE EXPECTED OUT CHUNK_BYTES STEP

Each conversion is a fork of this process, so a point costs milliseconds. After each kill the
promise is checked, then the resumed conversion is killed too, somewhere, then the next one must end
with the bytes of EXPECTED. n is 1, 1 + STEP, and so on until a conversion lives through it. Prints
how many points there were, and how many resumes were killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock

from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import decode_index
from serverlessllm.checkpoint.reader import verify
from serverlessllm.checkpoint.sources.base import open_file, open_folder

CHANGES = (
    *("open", "pwrite", "write", "ftruncate", "posix_fallocate"),
    *("fsync", "fdatasync", "rename", "unlink"),
)


def kill_at(point: int) -> None:
    """From now on, the `point`-th change of the disk is the last thing this process does."""
    changes = 0
    lock = Lock()

    def counted(name: str, change: Callable[..., object]) -> Callable[..., object]:
        def change_or_die(*arguments: object, **named: object) -> object:
            nonlocal changes
            if name == "open" and not int(str(arguments[1])) & os.O_CREAT:
                return change(*arguments, **named)
            with lock:
                changes += 1
                last = changes == point
            if last:
                if name == "pwrite" and point % 2:  # half of it gets through
                    descriptor, data, offset = arguments
                    assert isinstance(data, bytes | memoryview)
                    change(descriptor, data[: len(data) // 2 // 512 * 512], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **named)

        return change_or_die

    for name in CHANGES:
        setattr(os, name, counted(name, getattr(os, name)))


def forked(work: Callable[[], object]) -> bool:
    """Whether a fork that does `work` came to its end; else it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in {0, -signal.SIGKILL}, f"the conversion ended with {status}"
    return status == 0


def main(source: Path, expected: Path, out: Path, chunk_bytes: int, step: int) -> None:
    opened = open_folder if source.is_dir() else open_file
    chance = random.Random(7)
    whole = {name: (expected / name).read_bytes() for name in ("model.bin", "model.idx")}

    def run(point: int) -> None:
        if point:
            kill_at(point)
        convert(opened(source, model="test/model"), out, chunk_bytes=chunk_bytes)

    def check_promise() -> None:
        idx = out / "model.idx"
        if idx.exists():
            verify(out / "model.bin", decode_index(idx.read_bytes()))
            assert idx.read_bytes() == whole["model.idx"]

    points, killed_again = 0, 0
    for point in count(1, step):
        if forked(partial(run, point)):
            break
        check_promise()
        killed_again += not forked(partial(run, chance.randrange(1, point + 12)))
        check_promise()
        assert forked(partial(run, 0))
        for name, data in whole.items():
            assert (out / name).read_bytes() == data, f"{name} differs after a kill at {point}"
        shutil.rmtree(out)
        points += 1
    print(points, killed_again)


if __name__ == "__main__":
    _source, _expected, _out, _chunk_bytes, _step = sys.argv[1:]
    main(Path(_source), Path(_expected), Path(_out), int(_chunk_bytes), int(_step))
