"""JSON that is as much work to read as a body of its size can be, for each route that reads any."""

from __future__ import annotations

from collections.abc import Iterator

from serverlessllm.core.units import MIB

BODY_BYTES = 4 * MIB
_MARGIN_BYTES = 512
"""For what is around the shape."""

START = {
    "/v1/chat/completions": b'"messages":[{"role":"user","content":"hi"}]',
    "/v1/completions": b'"prompt":"hi"',
    "/v1/embeddings": b'"input":"hi"',
    "/v1/tokenize": b'"prompt":"hi"',
    "/v1/rerank": b'"query":"hi","documents":["a"]',
    "/v1/responses": b'"input":"hi"',
    "/v1/messages": b'"max_tokens":9,"messages":[{"role":"user","content":"hi"}]',
    "/api/models": b'"backend":"fake"',
}
"""The fields that make a body good, by route."""

_TEXTS = {
    "letters": b"a",
    "escaped line breaks": b"\\n",
    "escaped letters": b"\\u00e9",
    "escaped pairs": b"\\ud83d\\ude00",
    "escaped quotes": b'\\"',
    "escaped backslashes": b"\\\\",
    "two-byte letters": "é".encode(),
    "four-byte letters": "😀".encode(),
    "control characters": b"\x01",
    "broken UTF-8": b"\xc3",
}
_ITEMS = {
    "zeros": b"0",
    "floats": b"1.234567890123e-300",
    "integers": b"2147483647",
    "empty arrays": b"[]",
    "empty objects": b"{}",
    "objects": b'{"a":0}',
    "strings": b'"a"',
    "deep arrays": b"[" * 60 + b"]" * 60,
    "deep objects": b'{"a":' * 60 + b"0" + b"}" * 60,
    "messages": b'{"role":"user","content":"x"}',
    "parts": b'{"type":"text","text":"x"}',
    "tools": b'{"type":"function","function":{"name":"a","parameters":{}}}',
    "blank": b" " * 40 + b"0",
}
_COUNTS_MAX = (39_000, 49_000, 99_000, BODY_BYTES)
"""Below and above the limits on members, strings and containers."""
_LISTS = {
    "messages": ("messages", "parts"),
    "input": ("zeros", "integers", "strings", "messages", "parts"),
    "prompt": ("zeros", "integers", "strings"),
    "documents": ("strings", "objects"),
    "tools": ("zeros", "tools", "objects"),
    "stop": ("strings",),
}
"""Fields that are read, and what a list of them may hold."""


_TOOLS = (
    b'"tools":[{"type":"function","function":{"name":"a","parameters":{%b}}}]',
    b'"tools":[{"type":"function","name":"a","parameters":{%b}}]',
    b'"tools":[{"name":"a","input_schema":{%b}}]',
)
"""A tool with a schema, in each dialect."""


def bodies(path: str, size_bytes: int = BODY_BYTES) -> Iterator[tuple[str, bytes]]:
    """Named bodies of `size_bytes` at most; most are refused, and all must be at once."""
    most = size_bytes - _MARGIN_BYTES
    for name, unit in _TEXTS.items():
        text = b'"' + unit * (most // len(unit)) + b'"'
        yield f"{name} beside", _body(path, b'"x":' + text)
        yield f"{name} inside", _read_text(path, text)
    for name, unit in _ITEMS.items():
        for count in _COUNTS_MAX:
            if count * (len(unit) + 1) > most and count != _COUNTS_MAX[-1]:
                continue
            items = b",".join([unit] * min(count, most // (len(unit) + 1)))
            yield f"{count} {name} beside", _body(path, b'"x":[' + items + b"]")
            for listed, kinds in _LISTS.items():
                if name in kinds:
                    several = b'"%b":[%b]' % (listed.encode(), items)
                    yield f"{count} {name} as {listed}", _body(path, several)
    yield from _keys(path, most)
    yield "open arrays", b"[" * size_bytes
    yield "open objects", b'{"a":' * (size_bytes // 5)
    yield "quotes", b'"' * size_bytes
    yield "line breaks", b"\n" * size_bytes
    for field in (b"seed", b"temperature", b"x"):
        yield f"digits as {field.decode()}", _body(path, b'"%b":%b' % (field, b"9" * most))


def _keys(path: str, most: int) -> Iterator[tuple[str, bytes]]:
    for count in (39_000, 49_000, 99_000):
        several = b",".join(b'"%d":1' % n for n in range(count))
        for field in (b"x", b"logit_bias", b"metadata", b"web_search_options", b"options"):
            yield f"{count} keys as {field.decode()}", _body(path, b'"%b":{%b}' % (field, several))
        form = b'"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{%b}}}'
        yield f"a schema of {count} keys", _body(path, form % several)
        for shape, tool in enumerate(_TOOLS):
            yield f"a tool of {count} keys, shape {shape}", _body(path, tool % several)
        yield f"{count} keys at the top", _body(path, several)
    yield "a key again and again", _body(path, b",".join([b'"a":0'] * (most // 6)))


def _body(path: str, more: bytes) -> bytes:
    return b'{"model":"m",' + START[path] + b"," + more + b"}"


def _read_text(path: str, text: bytes) -> bytes:
    """With a text of the client's own where the route reads one."""
    return b'{"model":"m",' + START[path].replace(b'"hi"', text) + b"}"
