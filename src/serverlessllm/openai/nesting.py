"""How deep a JSON body is nested, found without building any of it.

Only byte operations that run in C: a body of megabytes costs milliseconds, and no parser has
recursed by then.
"""

from __future__ import annotations

from serverlessllm.core.errors import InvalidJSON
from serverlessllm.openai.settings import RequestLimits

_to_brackets = bytes.maketrans(b"{}", b"[]")
_others = bytes(byte for byte in range(256) if byte not in b"[]{}")


def check_nesting(body: bytes, limits: RequestLimits) -> None:
    """Raise `InvalidJSON` when the body is nested deeper, or has more strings or containers,
    than the limits allow. What is not JSON at all may pass: the parser will say so."""
    few_strings = len(body) <= limits.strings_max or body.count(b'"') <= 2 * limits.strings_max
    if few_strings and body.count(b"[") + body.count(b"{") <= limits.depth_max:
        return
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') > 2 * limits.strings_max:
        raise InvalidJSON(f"the body has more than {limits.strings_max} strings")
    brackets = b"".join(body.split(b'"')[::2]).translate(_to_brackets, _others)
    if len(brackets) > 2 * limits.containers_max:
        raise InvalidJSON(f"the body has more than {limits.containers_max} arrays and objects")
    # Each pass takes away the innermost pairs: one level.
    for _ in range(limits.depth_max):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise InvalidJSON(f"the body is nested deeper than {limits.depth_max} levels")
