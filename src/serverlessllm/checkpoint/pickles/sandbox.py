"""The interpreter in a process of its own that can do nothing but answer, and is not believed.

The interpreter runs nothing of a pickle; this is the second wall, for the bug that nobody knows.
It costs about 30 ms a file.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

import serverlessllm
from serverlessllm.checkpoint.bounds import check_count
from serverlessllm.checkpoint.pickles.child import MESSAGE_CHARS_MAX
from serverlessllm.checkpoint.pickles.interpreter import PICKLE_BYTES_MAX
from serverlessllm.checkpoint.pickles.values import NUMBER_MAX, StateDict, TensorView
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.core.units import MIB

WALL_S: Final = 60.0
"""A machine may stall for seconds; the work itself takes less than one."""
ANSWER_BYTES_MAX: Final = 32 * MIB

_ROOT = Path(serverlessllm.__file__).parents[1]
_CHILD = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from serverlessllm.checkpoint.pickles.child import main; main(int(sys.argv[2]))"
)


class _Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the child says: tensors, or why not."""

    tensors: tuple[TensorView, ...] = ()
    wrapped_in: tuple[str, ...] = ()
    refused: str | None = None
    unsupported: bool = False


def read_state_dict_apart(data: bytes) -> StateDict:
    """As `interpreter.read_state_dict`, in a confined child process.

    The answer's form and numbers are checked; the caller checks its names, and all against the
    archive.

    Raises:
        CheckpointError: the pickle is refused, or the child did not answer within its limits.
    """
    if len(data) > PICKLE_BYTES_MAX:
        raise CheckpointError(f"a pickle of {len(data)} bytes, more than {PICKLE_BYTES_MAX}")
    try:
        answer = msgspec.json.decode(_ask(data), type=_Answer)
    except ValueError:  # msgspec's own, or not UTF-8
        raise CheckpointError("the reader of its pickle gave no answer, or one of no use") from None
    if answer.refused is not None:
        message = answer.refused[:MESSAGE_CHARS_MAX]
        message = message if message.isprintable() else ascii(message)
        raise (UnsupportedCheckpoint if answer.unsupported else CheckpointError)(message)
    check_count(len(answer.tensors), "tensors")
    for view in answer.tensors:
        numbers = (view.storage_bytes, view.offset, *view.shape, *view.strides)
        if any(not 0 <= number <= NUMBER_MAX for number in numbers):
            raise CheckpointError(f"tensor {view.name!r}: a number that is out of range")
    return StateDict(answer.tensors, answer.wrapped_in)


def _ask(data: bytes) -> bytes:
    """What the child writes; all that it may have is `data`, as a file in memory."""
    pickle = os.memfd_create("pickle", os.MFD_CLOEXEC)
    try:
        with open(pickle, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(pickle, 0, os.SEEK_SET)
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _CHILD, str(_ROOT), str(os.getpid())],
            stdin=pickle,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
        )
    except OSError as error:
        raise CheckpointError(
            f"the reader of its pickle cannot be started: {error.strerror}"
        ) from error
    finally:
        os.close(pickle)
    with child:
        try:
            return _answer_of(child)
        finally:
            child.kill()


def _answer_of(child: subprocess.Popen[bytes]) -> bytes:
    assert child.stdout is not None
    clock = SystemClock()
    deadline_s = clock.now_s() + WALL_S
    answer = bytearray()
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    while True:
        left_s = deadline_s - clock.now_s()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise CheckpointError(f"its pickle was not read within {WALL_S:.0f} s")
        part = os.read(child.stdout.fileno(), 1 << 20)
        if not part:
            return bytes(answer)
        answer += part
        if len(answer) > ANSWER_BYTES_MAX:
            raise CheckpointError(f"its pickle describes more than {ANSWER_BYTES_MAX} bytes")
