"""What no client should send: refused quickly, by the contract, and nothing else suffers."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator

import pytest

from serverlessllm.core.ids import Address
from serverlessllm.core.units import MIB
from serverlessllm.testing.answers import Answer, ask, ask_chat, check_error, connect
from serverlessllm.testing.management import register

CHAT = "/v1/chat/completions"
QUICK_MS = 1000


def prompt(text: str) -> bytes:
    """A chat whose only message's JSON is `text`."""
    return b'{"model":"fake","messages":[{"role":"user","content":%b}]}' % text.encode()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"hello", "invalid_json"),
        (b'{"model":"fake",', "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"fake"', "invalid_json"),
        (prompt("[" * 100_000), "invalid_json"),
        (prompt("[" * 1000 + "]" * 1000), "invalid_json"),
        (prompt('"' + "\\ud800" * 3 + '"'), "invalid_json"),
        (b'{"model":"fake","messages":"\xff\xfe"}', "invalid_json"),
        (b'{"model":"fake","temperature":NaN,"messages":[]}', "invalid_json"),
        (b'{"messages":[]}', "empty_array"),
        (b"{}", "missing_required_parameter"),
        (b'{"model":7,"messages":[]}', "invalid_type"),
        (b'{"model":"fake","messages":[]}', "empty_array"),
        (b'{"model":"fake","n":1e99}', "invalid_type"),
        (b'{"model":"../../etc","messages":[{"role":"user","content":""}]}', "invalid_model_name"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else "",
)
def test_a_body_that_cannot_be_a_chat(server, body, code):
    refused = ask(server.url, "POST", CHAT, body)
    check_error(refused, 400, code)
    assert refused.headers["x-should-retry"] == "false"
    assert int(refused.headers["openai-processing-ms"]) < QUICK_MS


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("PUT", "/api/models", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/chat", 404, "not_found"),
        ("GET", "/v1/../etc/passwd", 404, "not_found"),
        ("GET", "/api/nothing", 404, "not_found"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
        ("GET", "/api/models/nobody", 404, "model_not_found"),
    ],
)
def test_a_request_that_goes_nowhere(server, method, path, status, code):
    check_error(ask(server.url, method, path), status, code)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "image/png"])
def test_a_body_of_another_type(server, kind):
    refused = ask(server.url, "POST", CHAT, b"{}", {"content-type": kind})
    check_error(refused, 415, "unsupported_media_type")


def announced(address: Address, size_bytes: int) -> Answer:
    """What a body is answered that is only announced."""
    headers = {"content-type": "application/json", "content-length": str(size_bytes)}
    return ask(address, "POST", CHAT, None, headers)


def unannounced(address: Address, size_bytes: int) -> Answer:
    """What is answered to a body that comes in chunks and does not say how long it is."""

    def chunks() -> Iterator[bytes]:
        for _ in range(size_bytes // MIB):
            yield b" " * MIB

    connection = connect(address)
    try:
        connection.request(
            "POST", CHAT, chunks(), {"content-type": "application/json"}, encode_chunked=True
        )
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, headers, answer.read())
    finally:
        connection.close()


@pytest.mark.parametrize("send", [announced, unannounced])
def test_a_body_that_is_too_large(server, send):
    check_error(send(server.url, 9 * MIB), 413, "request_too_large")


def test_a_body_over_the_bound_of_the_management(server):
    body = {"model": "x", "options": {"pad": "x" * (2 * MIB)}}
    check_error(ask(server.url, "POST", "/api/models", body), 413, "request_too_large")


def test_headers_that_are_too_large(server):
    refused = ask(server.url, "GET", "/v1/models", headers={"x-pad": "x" * 60_000})
    check_error(refused, 431, "headers_too_large")


def test_what_is_not_http_is_answered_and_closed(server):
    connection = connect(server.url)
    connection.connect()
    try:
        connection.sock.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        answer = http.client.HTTPResponse(connection.sock)
        answer.begin()
        assert answer.status == 400
        assert set(json.loads(answer.read())["error"]) == {"message", "type", "param", "code"}
        assert connection.sock.recv(1) == b""
    finally:
        connection.close()


@pytest.mark.parametrize("seconds", ["-1", "soon", "nan"])
def test_a_wait_that_is_no_number(server, seconds):
    # Asked of a model that is not ready, for only then is it read.
    model = f"asleep{seconds}"
    register(server.url, model=model, backend="fake")
    refused = ask_chat(server.url, model, {"x-sllm-wait": seconds})
    check_error(refused, 400, "invalid_request")


def test_a_web_page_of_another_origin_may_not_ask(server):
    refused = ask(server.url, "GET", "/v1/models", headers={"origin": "https://evil.example"})
    check_error(refused, 403, "forbidden")
    refused = ask(server.url, "GET", "/v1/models", headers={"host": "evil.example"})
    check_error(refused, 403, "forbidden")


def test_all_that_is_served_afterwards(server):
    assert ask_chat(server.url, "fake").status == 200
