"""One HTTP exchange as it is on the wire, and the error contract that every refusal keeps."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from serverlessllm.core.ids import Address

_TIMEOUT_S = 60.0
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Of an error, where its status alone does not say it."""
STAGES = ("queue", "place", "fetch", "read", "start", "ttft")
"""Of `Server-Timing`."""


class Answer(NamedTuple):
    """Status, headers (names in lower case) and the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


def connect(address: Address) -> http.client.HTTPConnection:
    """A connection to `http://host:port` or `unix:/path`, not yet opened."""
    if address.startswith("unix:"):
        return _UnixConnection(address.removeprefix("unix:"))
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=_TIMEOUT_S)


def ask(
    address: Address,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own; `body`: bytes as they are, anything else as JSON."""
    connection = connect(address)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        sent = {"content-type": "application/json"} | dict(headers or {})
        connection.request(method, path, data, sent)
        answer = connection.getresponse()
        received = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, received, answer.read())
    finally:
        connection.close()


def ask_chat(
    address: Address, model: str, headers: Mapping[str, str] | None = None, **fields: object
) -> Answer:
    """A chat of one message."""
    body = {"model": model, "messages": [{"role": "user", "content": "Go."}], **fields}
    return ask(address, "POST", "/v1/chat/completions", body, headers)


def check_explained(answer: Answer) -> None:
    """Every answer names itself and tells where its time went."""
    assert answer.headers["x-request-id"]
    assert int(answer.headers["openai-processing-ms"]) >= 0
    timing = answer.headers["server-timing"].split(",")
    assert tuple(stage.partition(";")[0].strip() for stage in timing) == STAGES


def check_error(answer: Answer, status: int, code: str) -> str:
    """The answer is this error, told by the contract; its message."""
    assert (answer.status, answer.json()["error"].get("code")) == (status, code), answer
    check_explained(answer)
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    usual = "invalid_request_error" if status < 500 else "server_error"
    assert error["type"] == _TYPES.get(status, usual)
    assert error["param"] is None or isinstance(error["param"], str)
    if status in {429, 503}:
        assert 1 <= int(answer.headers["retry-after"]) <= 120
    else:
        assert "retry-after" not in answer.headers
    assert answer.headers.get("x-should-retry") in {None, "false"}
    message: str = error["message"]
    assert message
    assert "Traceback" not in message
    return message


def figure(address: Address, name: str, **labels: str) -> float:
    """The sum of a metric's samples that carry these labels."""
    total = 0.0
    for line in ask(address, "GET", "/metrics").body.decode().splitlines():
        series, _, value = line.rpartition(" ")
        sample, _, carried = series.partition("{")
        if sample == name and all(f'{key}="{text}"' in carried for key, text in labels.items()):
            total += float(value)
    return total
