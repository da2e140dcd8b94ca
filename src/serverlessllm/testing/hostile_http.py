"""What hostile clients send to an HTTP server, byte for byte, and what they may be answered.

Each case is one connection. Whatever is allowed here, a server must be as before afterwards.
"""

from __future__ import annotations

import gzip
from typing import Literal

import msgspec

from serverlessllm.core.units import KIB, MIB

HOST = b"host: localhost\r\n"
JSON = b"content-type: application/json\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + JSON
ALIVE = b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
SIZE = b"content-length: %d\r\n" % len(BODY)
SMUGGLED = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"x-request-id: smuggled\r\n\r\n"
"""Sent behind what must be refused: nobody may ever answer it."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One connection of a hostile client."""

    name: str
    sends: tuple[bytes, ...]
    """One write each, a moment apart."""
    statuses: tuple[int, ...]
    """What each answer may be; of interim answers nothing is said."""
    answers: tuple[int, int] = (1, 1)
    """How many there are at least and at most."""
    then: Literal["read", "fin", "reset", "drip", "deaf"] = "read"
    """What the client does next: listen; say that it has ended; vanish; go on byte by byte for as
    long as it can; leave the answers where they are, then listen."""
    closes: bool = True
    """Whether the server ends the connection; otherwise a good request on it is answered."""


def chat(*lines: bytes, body: bytes = BODY) -> bytes:
    """A whole good request, with more header lines."""
    return CHAT + b"content-length: %d\r\n" % len(body) + b"".join(lines) + b"\r\n" + body


def chunked(*chunks: bytes) -> bytes:
    """A request whose body is framed by hand."""
    return CHAT + CHUNKED + b"\r\n" + b"".join(chunks)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST = b"0\r\n\r\n"
_CHUNKS = chunk(BODY[:9]) + chunk(BODY[9:])


def _refused(status: int, **datas: bytes) -> list[Case]:
    """One answer, and nothing behind it is read."""
    return [
        Case(name=name.replace("_", " "), sends=(data + SMUGGLED,), statuses=(status,))
        for name, data in datas.items()
    ]


def _answered(*statuses: int, **datas: bytes) -> list[Case]:
    """One answer, and the connection goes on."""
    return [
        Case(name=name.replace("_", " "), sends=(data,), statuses=statuses, closes=False)
        for name, data in datas.items()
    ]


LENGTHS = _refused(
    400,
    length_and_coding=CHAT + SIZE + CHUNKED + b"\r\n" + LAST,
    coding_and_length=CHAT + CHUNKED + SIZE + b"\r\n" + LAST,
    two_lengths=CHAT + SIZE + b"content-length: 3\r\n\r\n" + BODY,
    a_length_twice=CHAT + SIZE + SIZE + b"\r\n" + BODY,
    a_list_of_lengths=CHAT + b"content-length: 57, 57\r\n\r\n" + BODY,
    a_negative_length=CHAT + b"content-length: -1\r\n\r\n" + BODY,
    a_signed_length=CHAT + b"content-length: +57\r\n\r\n" + BODY,
    a_hex_length=CHAT + b"content-length: 0x39\r\n\r\n" + BODY,
    a_grouped_length=CHAT + b"content-length: 5_7\r\n\r\n" + BODY,
    a_length_with_a_gap=CHAT + b"content-length: 5 7\r\n\r\n" + BODY,
    no_length_in_the_length=CHAT + b"content-length:\r\n\r\n" + BODY,
    an_endless_length=CHAT + b"content-length: " + b"9" * 40 + b"\r\n\r\n",
    a_length_that_wraps=CHAT + b"content-length: 18446744073709551673\r\n\r\n" + BODY,
    space_before_the_colon=CHAT + b"content-length : 57\r\n\r\n" + BODY,
)
CODINGS = _refused(
    400,
    coding_unknown=CHAT + b"transfer-encoding: xchunked\r\n\r\n" + LAST,
    coding_not_last=CHAT + b"transfer-encoding: chunked, gzip\r\n\r\n" + LAST,
    coding_not_undone=CHAT + b"transfer-encoding: gzip, chunked\r\n\r\n" + LAST,
    coding_identity=CHAT + b"transfer-encoding: identity\r\n\r\n" + LAST,
    coding_twice=CHAT + CHUNKED + CHUNKED + b"\r\n" + LAST,
    coding_and_another=CHAT + CHUNKED + b"transfer-encoding: identity\r\n\r\n" + LAST,
    coding_with_a_tab=CHAT + b"transfer-encoding: \x0bchunked\r\n\r\n" + LAST,
    coding_quoted=CHAT + b'transfer-encoding: "chunked"\r\n\r\n' + LAST,
    coding_with_a_parameter=CHAT + b"transfer-encoding: chunked;q=1\r\n\r\n" + LAST,
    coding_before_a_gap=CHAT + b"transfer-encoding : chunked\r\n\r\n" + LAST,
    coding_in_http_1_0=CHAT.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + LAST,
)
LINES = _refused(
    400,
    a_folded_header=CHAT + SIZE + b"x-a: a\r\n b\r\n\r\n" + BODY,
    a_folded_first_header=b"GET /livez HTTP/1.1\r\n host: localhost\r\n\r\n",
    bare_lf=ALIVE.replace(b"\r\n", b"\n"),
    bare_lf_at_the_end=ALIVE[:-4] + b"\n\n",
    bare_cr=ALIVE[:-2] + b"x-a: a\rx-b: b\r\n\r\n",
    nul_in_a_value=ALIVE[:-2] + b"x-a: a\0b\r\n\r\n",
    nul_in_a_name=ALIVE[:-2] + b"x\0a: b\r\n\r\n",
    nul_in_the_path=b"GET /livez\0 HTTP/1.1\r\n" + HOST + b"\r\n",
    bytes_in_the_path=b"GET /\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n",
    utf_8_in_the_path="GET /é HTTP/1.1\r\n".encode() + HOST + b"\r\n",
    bytes_in_a_name=ALIVE[:-2] + b"x-\xff: b\r\n\r\n",
    a_header_without_a_colon=ALIVE[:-2] + b"x-a\r\n\r\n",
    a_header_without_a_name=ALIVE[:-2] + b": a\r\n\r\n",
    no_host=b"GET /livez HTTP/1.1\r\n\r\n",
    two_hosts=ALIVE[:-2] + b"host: other\r\n\r\n",
    two_keys=ALIVE[:-2] + b"authorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n",
    two_keys_elsewhere=ALIVE[:-2] + b"x-api-key: a\r\nX-Api-Key: b\r\n\r\n",
)
TARGETS = _refused(
    400,
    connect=b"CONNECT edge:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    authority_form=b"GET edge:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    another_scheme=b"GET ftp://edge/livez HTTP/1.1\r\n" + HOST + b"\r\n",
    no_target=b"GET HTTP/1.1\r\n" + HOST + b"\r\n",
    http_0_9=b"GET /livez\r\n\r\n",
    http_1_2=ALIVE.replace(b"1.1", b"1.2"),
    http_2=ALIVE.replace(b"1.1", b"2.0"),
    http_in_small_letters=ALIVE.replace(b"HTTP", b"http"),
    http_of_many_digits=ALIVE.replace(b"1.1", b"1.11"),
    http_2_with_prior_knowledge=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    tls=b"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03" + bytes(40),
    ssh=b"SSH-2.0-OpenSSH_9.6\r\n",
    a_method_in_small_letters=ALIVE.replace(b"GET", b"get"),
    an_unknown_method=ALIVE.replace(b"GET", b"FROB"),
    zeros=bytes(4096),
)
CHUNKS = _refused(
    400,
    chunk_size_not_hex=chunked(b"zz\r\nabc\r\n", LAST),
    chunk_size_negative=chunked(b"-1\r\nabc\r\n", LAST),
    chunk_size_prefixed=chunked(b"0x3\r\nabc\r\n", LAST),
    chunk_size_signed=chunked(b"+3\r\nabc\r\n", LAST),
    chunk_size_missing=chunked(b"\r\nabc\r\n", LAST),
    chunk_size_overflows=chunked(b"fffffffffffffffff\r\nabc\r\n"),
    chunk_after_a_space=chunked(b" 3\r\nabc\r\n", LAST),
    chunk_without_its_end=chunked(b"3\r\nabcX\r\n", LAST),
    chunk_ended_by_lf=chunked(b"3\nabc\n", b"0\n\n"),
    chunk_extension_ended_by_lf=chunked(b"3;a\nabc\r\n", LAST),
    chunk_extension_with_cr=chunked(b"3;a\rb\r\nabc\r\n", LAST),
    chunk_extension_too_long=chunked(b"3;" + b"a" * 200 * KIB + b"\r\nabc\r\n", LAST),
    trailer_of_length=chunked(_CHUNKS, b"0\r\ncontent-length: 99\r\n\r\n"),
    trailer_folded=chunked(_CHUNKS, b"0\r\nx-a: a\r\n b\r\n\r\n"),
    trailer_without_a_colon=chunked(_CHUNKS, b"0\r\nx-a\r\n\r\n"),
    trailers_too_long=chunked(_CHUNKS, b"0\r\n" + b"x-a: a\r\n" * 20_000 + b"\r\n"),
)
SIZES = [
    *_refused(
        431,
        a_long_target=b"GET /" + b"a" * 40 * KIB + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        a_long_query=b"GET /livez?" + b"a" * 40 * KIB + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        a_long_name=ALIVE[:-2] + b"x" * 40 * KIB + b": a\r\n\r\n",
        a_long_value=ALIVE[:-2] + b"x-a: " + b"a" * MIB + b"\r\n\r\n",
        a_head_without_end=ALIVE[:-2] + b"x-a: " + b"a" * 300 * KIB,
        many_headers=ALIVE[:-2] + b"".join(b"x-%d: a\r\n" % n for n in range(200)) + b"\r\n",
        one_header_many_times=ALIVE[:-2] + b"a:\r\n" * 64_000 + b"\r\n",
    ),
    *_refused(
        413,
        a_long_body_announced=CHAT + b"content-length: 5000000\r\n\r\n",
        a_very_long_body_announced=CHAT + b"content-length: 9223372036854775807\r\n\r\n",
        a_long_body_in_chunks=chunked(chunk(b"a" * MIB) * 5),
        a_long_body_in_one_chunk=chunked(b"7fffffff\r\n" + b"a" * 5 * MIB),
    ),
]
NOT_GOOD = [
    *_answered(
        400,
        no_body=CHAT + b"\r\n",
        empty_body=chat(body=b""),
        not_json=chat(body=b"{" * 40),
        bytes_in_the_body=chat(body=BODY.replace(b"hi", b"\xff\xc0\xaf")),
        half_a_surrogate=chat(body=BODY.replace(b"hi", b"\\ud800")),
        nul_in_the_body=chat(body=BODY.replace(b"hi", b"\0")),
        not_a_number=chat(body=BODY[:-1] + b',"temperature":NaN}'),
        deep=chat(body=BODY[:-1] + b',"x":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        a_huge_number=chat(body=BODY[:-1] + b',"seed":' + b"9" * 5000 + b"}"),
    ),
    *_answered(400, 415, compressed=chat(b"content-encoding: gzip\r\n", body=gzip.compress(BODY))),
    *_answered(
        415,
        a_form=chat().replace(b"application/json", b"application/x-www-form-urlencoded"),
        a_type_of_bytes=chat().replace(b"application/json", b"\xff\xff"),
    ),
    *_answered(
        404,
        escaped_nul=ALIVE.replace(b"livez", b"%00"),
        escaped_dots=ALIVE.replace(b"livez", b"livez/%2e%2e/%2e%2e/etc/passwd"),
        dots=ALIVE.replace(b"livez", b"../../etc/passwd"),
        bad_escape=ALIVE.replace(b"livez", b"%zz%"),
        overlong_escape=ALIVE.replace(b"livez", b"%c0%af"),
        two_slashes=ALIVE.replace(b"livez", b"/livez"),
        escaped_line_break=ALIVE.replace(b"livez", b"x%0d%0ax-a:%20b"),
        no_model_of_escapes=ALIVE.replace(b"livez", b"v1/models/%ff%00"),
    ),
    *_answered(
        404,
        405,
        options_of_all=b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",
        trace=ALIVE.replace(b"GET", b"TRACE"),
        put=ALIVE.replace(b"GET", b"PUT"),
        get_a_chat=ALIVE.replace(b"livez", b"v1/chat/completions"),
    ),
]
GOOD = _answered(
    200,
    plain=chat(),
    chunks=chunked(_CHUNKS, LAST),
    chunks_in_capitals=CHAT + b"Transfer-Encoding: CHUNKED\r\n\r\n" + _CHUNKS + LAST,
    single_byte_chunks=chunked(*(chunk(BODY[n : n + 1]) for n in range(len(BODY))), LAST),
    chunk_extensions=chunked(b'9;a="b";c\r\n', BODY[:9], b"\r\n", chunk(BODY[9:]), LAST),
    trailers=chunked(_CHUNKS, b"0\r\nhost: evil\r\nx-request-id: evil\r\n\r\n"),
    zeros_before_the_length=CHAT + b"content-length: " + b"0" * 9000 + b"57\r\n\r\n" + BODY,
    zeros_before_a_size=chunked(b"0" * 12 + b"39\r\n" + BODY + b"\r\n", LAST),
    two_spaces=ALIVE.replace(b"livez", b"livez "),
    line_breaks_before=b"\r\n\r\n" + chat(),
    absolute_form=b"GET http://evil/livez HTTP/1.1\r\n" + HOST + b"\r\n",
    bytes_in_a_value=chat(b"x-a: \xff\xfe\x80\r\n"),
    upgrade_to_h2c=chat(b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"),
    upgrade_to_websocket=chat(b"connection: upgrade\r\nupgrade: websocket\r\n"),
    an_unknown_header_of_length=chat(b"content_length: 9\r\ntransfer_encoding: chunked\r\n"),
    continue_with_the_body_there=chat(b"expect: 100-continue\r\n"),
    an_unsafe_request_id=chat(b"x-request-id: a b\"'<script>\r\n"),
    a_query=ALIVE.replace(b"livez", b"livez?a=%00&b=../..&&&"),
    head=b"HEAD /livez HTTP/1.1\r\nhost: localhost\r\n\r\n",
)
SLOW = [
    Case(name="nothing", sends=(b"",), statuses=(), answers=(0, 0)),
    Case(name="line breaks only", sends=(b"\r\n",), statuses=(408,)),
    Case(name="half a method", sends=(b"PO",), statuses=(408,)),
    Case(name="half a head", sends=(CHAT,), statuses=(408,)),
    Case(name="half a body", sends=(chat()[:-9],), statuses=(408,)),
    Case(name="half a chunk", sends=(chunked(_CHUNKS)[:-9],), statuses=(408,)),
    Case(name="no last chunk", sends=(chunked(_CHUNKS),), statuses=(408,)),
    Case(name="half a trailer", sends=(chunked(_CHUNKS, b"0\r\nx-a"),), statuses=(408,)),
    Case(name="a head, drop by drop", sends=(CHAT + b"x-a: ",), statuses=(408,), then="drip"),
    Case(
        name="a body, drop by drop",
        sends=(CHAT + b"content-length: 4000000\r\n\r\n",),
        statuses=(408,),
        then="drip",
    ),
    Case(
        name="a chunk, drop by drop",
        sends=(chunked(b"fffff\r\n"),),
        statuses=(408,),
        then="drip",
    ),
    Case(
        name="continue, and nothing comes",
        sends=(CHAT + SIZE + b"expect: 100-continue\r\n\r\n",),
        statuses=(408,),
    ),
    Case(name="half a TLS hello", sends=(b"\x16",), statuses=(400, 408)),
]
PIPELINED = [
    Case(name="two", sends=(chat() * 2,), statuses=(200,), answers=(2, 2), closes=False),
    Case(
        name="good, bad", sends=(chat() + b"bad" + SMUGGLED,), statuses=(200, 400), answers=(2, 2)
    ),
    Case(name="bad, good", sends=(b"bad\r\n\r\n" + SMUGGLED,), statuses=(400,)),
    Case(
        name="one to close, one more",
        sends=(chat(b"connection: close\r\n") + SMUGGLED,),
        statuses=(200,),
    ),
    Case(
        name="HTTP/1.0, one more",
        sends=(ALIVE.replace(b"1.1", b"1.0") + SMUGGLED,),
        statuses=(200,),
    ),
    Case(
        name="a thousand",
        sends=(chat() * 1000,),
        statuses=(200, 400),
        answers=(1, 1001),
        closes=True,
    ),
    Case(
        name="a thousand, unread",
        sends=(ALIVE.replace(b"livez", b"openapi.json") * 50,) * 20,
        statuses=(200, 400),
        answers=(1, 1000),
        then="deaf",
        closes=False,
    ),
    Case(
        name="a length that does not fit",
        sends=(CHAT + b"content-length: 9\r\n\r\n" + BODY,),
        statuses=(400,),
        answers=(2, 2),
    ),
    Case(
        name="many upgrades",
        sends=(chat(b"connection: upgrade\r\nupgrade: h2c\r\n") * 500,),
        statuses=(200, 400),
        answers=(1, 501),
        closes=True,
    ),
]
_STAGES = {
    "nothing": b"",
    "half a request line": CHAT[:20],
    "half a head": CHAT,
    "half a body": chat()[:-9],
    "half a chunk": chunked(_CHUNKS)[:-9],
    "everything": chat(),
    "two requests": chat() * 2,
    "a stream's request": chat(body=BODY[:-1] + b',"stream":true}'),
}
GONE = [
    Case(
        name=f"{then} after {stage}",
        sends=(data,),
        statuses=(200, 400),
        answers=(0, 2),
        then=then,
    )
    for stage, data in _STAGES.items()
    for then in ("fin", "reset")
]
CASES: tuple[Case, ...] = (
    *(*LENGTHS, *CODINGS, *LINES, *TARGETS, *CHUNKS, *SIZES),
    *(*NOT_GOOD, *GOOD, *SLOW, *PIPELINED, *GONE),
)
