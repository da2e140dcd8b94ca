"""The process that reads one pickle: bytes on stdin, descriptions on stdout, and nothing else.

Started by `sandbox`. It imports what it needs, gives up every other right, and only then reads.
"""

from __future__ import annotations

import gc
import json
import os
from typing import Final

from serverlessllm.checkpoint.pickles.confine import confine
from serverlessllm.checkpoint.pickles.interpreter import PICKLE_BYTES_MAX, read_state_dict
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint

MESSAGE_CHARS_MAX: Final = 1000


def main(parent: int) -> None:
    """Answer one JSON object and end. What cannot be answered ends the process otherwise."""
    confine(parent)
    gc.disable()  # nothing lives longer than the process
    answer = json.dumps(_answer(_read_all())).encode()
    done = 0
    while done < len(answer):
        done += os.write(1, answer[done:])
    os._exit(0)


def _read_all() -> bytes:
    parts = []
    left = PICKLE_BYTES_MAX + 1
    while left and (part := os.read(0, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _answer(data: bytes) -> dict[str, object]:
    try:
        state = read_state_dict(data)
    except CheckpointError as error:
        return {
            "refused": error.message[:MESSAGE_CHARS_MAX],
            "unsupported": isinstance(error, UnsupportedCheckpoint),
        }
    return {"tensors": state.tensors, "wrapped_in": state.wrapped_in}
