"""How deep a JSON body is nested, and of how much it is made, found without building any of it.

Only byte operations that run in C: a body of megabytes costs milliseconds, and no parser has
recursed by then.
"""

from __future__ import annotations

import time
from itertools import accumulate
from typing import Final

from serverlessllm.core.errors import InvalidJSON
from serverlessllm.openai.settings import RequestLimits

LONG_BYTES: Final = 262_144
"""Longer bodies are read beside the event loop: the most hostile ones would hold it."""
_SHORT_BYTES: Final = 16_384
"""Such a body is worth counting before anything else is done with it."""
_to_brackets: Final = bytes.maketrans(b"{}", b"[]")
_to_steps: Final = bytes.maketrans(b"[]", b"\x01\xff")
"""As signed bytes: one level down, one up."""
_plain: Final = bytes(byte for byte in range(256) if byte not in b'[]{}":')
_plain_beside_escapes: Final = bytes(byte for byte in _plain if byte not in b"\\/bfnrtu")
"""What may follow a backslash stays: else it would seem to escape the next thing that stays."""


def hand_over(size_bytes: int) -> None:
    """Let the event loop have the interpreter before the next step with a body of that size: in a
    thread, compiled code keeps it until all steps are done."""
    if size_bytes > LONG_BYTES:
        time.sleep(0)


def check_nesting(body: bytes, limits: RequestLimits) -> None:
    """Raise `InvalidJSON` when the body is nested deeper, or has more strings, escapes, items,
    members or containers, than the limits allow. What is not JSON at all may pass: the parser will
    say so."""
    size = len(body)
    if size <= _SHORT_BYTES and body.count(b"[") + body.count(b"{") <= limits.depth_max:
        return
    if size > limits.commas_max and body.count(b",") > limits.commas_max:
        raise InvalidJSON(f"the body has more than {limits.commas_max} commas")
    structure = _structure(body, limits)
    members = structure.count(b":")
    if members > limits.members_max:
        raise InvalidJSON(f"the body's objects have more than {limits.members_max} members")
    if len(structure) - members > 2 * limits.containers_max:
        raise InvalidJSON(f"the body has more than {limits.containers_max} arrays and objects")
    hand_over(size)
    brackets = structure.translate(_to_brackets, b":")
    # Most bodies are wide and shallow: their innermost pairs, one level, are most of them.
    outer = brackets.replace(b"[]", b"")
    levels = 0 if len(outer) == len(brackets) else 1
    steps = memoryview(outer.translate(_to_steps)).cast("b")
    if levels + max(accumulate(steps), default=0) > limits.depth_max:
        raise InvalidJSON(f"the body is nested deeper than {limits.depth_max} levels")


def _structure(body: bytes, limits: RequestLimits) -> bytes:
    """The brackets and colons outside of strings; raises `InvalidJSON` for too many escapes or
    strings."""
    size = len(body)
    if body.find(b"\\") >= 0:  # `in` would first try it as a number, and fail
        if size > limits.backslashes_max and body.count(b"\\") > limits.backslashes_max:
            raise InvalidJSON(f"the body has more than {limits.backslashes_max} backslashes")
        marks = body.translate(None, _plain_beside_escapes)
        marks = marks.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _plain)
    else:
        marks = body.translate(None, _plain)
    if marks.count(b'"') > 2 * limits.strings_max:
        raise InvalidJSON(f"the body has more than {limits.strings_max} strings")
    hand_over(size)
    return b"".join(marks.split(b'"')[::2])
