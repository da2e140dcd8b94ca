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
from serverlessllm.checkpoint.bounds import check_count, check_text, printable
from serverlessllm.checkpoint.pickles.builders import TORCH_DTYPES
from serverlessllm.checkpoint.pickles.child import MESSAGE_CHARS_MAX
from serverlessllm.checkpoint.pickles.interpreter import PICKLE_BYTES_MAX
from serverlessllm.checkpoint.pickles.values import (
    NUMBER_MAX,
    STORAGE_KEY_CHARS_MAX,
    StateDict,
    TensorView,
)
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import CheckpointError, SourceUnavailable, UnsupportedCheckpoint
from serverlessllm.core.units import MIB

WALL_S: Final = 60.0
"""A machine may stall for seconds; the work itself takes less than one."""
ANSWER_BYTES_MAX: Final = 64 * MIB
LINE_BYTES_MAX: Final = 8192

_DTYPES: Final = frozenset(TORCH_DTYPES.values())
_ROOT = Path(serverlessllm.__file__).parents[1]
_CHILD = (
    "import sys; sys.path.append(sys.argv[1]); "  # last: nothing there hides Python's own modules
    "from serverlessllm.checkpoint.pickles.child import main; main(int(sys.argv[2]))"
)


class _Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the child says first: how many tensors follow, one a line, or why none do."""

    tensors: int = 0
    wrapped_in: tuple[str, ...] = ()
    refused: str | None = None
    unsupported: bool = False


_HEAD, _VIEW = msgspec.json.Decoder(_Head), msgspec.json.Decoder(TensorView)


def read_state_dict_apart(data: bytes) -> StateDict:
    """As `interpreter.read_state_dict`, in a confined child process.

    Nothing in the answer has been checked against the archive.

    Raises:
        CheckpointError: the pickle is refused, or the child did not answer within its limits.
        SourceUnavailable: the machine has no process to spare for it now.
    """
    if len(data) > PICKLE_BYTES_MAX:
        raise CheckpointError(f"a pickle of {len(data)} bytes, more than {PICKLE_BYTES_MAX}")
    return decode_answer(_ask(data))


def decode_answer(answer: bytes) -> StateDict:
    """What the child says, which may be a lie from its first byte to its last.

    Memory: in proportion to the tensors that a model may have, whatever the answer is.

    Raises:
        CheckpointError: why the child refused the pickle; or the answer is none.
    """
    try:
        line, _, rest = answer.partition(b"\n")
        head = _HEAD.decode(_bounded(line))
        if head.refused is not None:
            raise _refusal(head.refused, head.unsupported)
        check_count(head.tensors, "tensors")
        *lines, after = rest.split(b"\n", head.tensors)
        if after or len(lines) != head.tensors:
            raise ValueError
        return StateDict(tuple(map(_view, lines)), head.wrapped_in)
    except ValueError:  # msgspec's own, not UTF-8, or cut off
        raise CheckpointError("the reader of its pickle gave no answer, or one of no use") from None


def _bounded(line: bytes) -> bytes:
    if len(line) > LINE_BYTES_MAX:
        raise ValueError
    return line


def _refusal(message: str, unsupported: bool) -> CheckpointError:
    kind = UnsupportedCheckpoint if unsupported else CheckpointError
    return kind(printable(message, MESSAGE_CHARS_MAX))


def _view(line: bytes) -> TensorView:
    view = _VIEW.decode(_bounded(line))
    check_text(view.name, "tensor name")
    numbers = (view.storage_bytes, view.offset, *view.shape, *view.strides)
    if (
        view.dtype not in _DTYPES
        or len(view.storage) > STORAGE_KEY_CHARS_MAX
        or any(not 0 <= number <= NUMBER_MAX for number in numbers)
    ):
        raise ValueError
    return view


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
        raise SourceUnavailable(
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
