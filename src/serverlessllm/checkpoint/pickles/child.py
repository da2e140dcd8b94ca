"""The process that reads one pickle: bytes on stdin, descriptions on stdout, and nothing else.

Started by `sandbox`. It imports what it needs, gives up every other right, and only then reads.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from typing import Final

from serverlessllm.checkpoint.pickles.confine import confine
from serverlessllm.checkpoint.pickles.interpreter import PICKLE_BYTES_MAX, read_state_dict
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint

MESSAGE_CHARS_MAX: Final = 1000


def main(parent: int) -> None:
    """Answer and end. What cannot be answered ends the process otherwise."""
    confine(parent)
    gc.disable()  # nothing lives longer than the process
    for line in answer_lines(_read_all()):
        sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
    os._exit(0)


def _read_all() -> bytes:
    parts = []
    left = PICKLE_BYTES_MAX + 1
    while left and (part := os.read(0, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def answer_lines(data: bytes) -> Iterator[bytes]:
    """Lines of JSON: how many tensors there are, then each; or why not.

    One at a time, so that an answer takes no memory here, and can be refused early there.
    """
    try:
        state = read_state_dict(data)
    except CheckpointError as error:
        unsupported = isinstance(error, UnsupportedCheckpoint)
        yield _line({"refused": error.message[:MESSAGE_CHARS_MAX], "unsupported": unsupported})
        return
    yield _line({"tensors": len(state.tensors), "wrapped_in": state.wrapped_in})
    yield from map(_line, state.tensors)


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
