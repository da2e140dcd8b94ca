"""The verbs' side of the management API: plain HTTP, typed answers, errors with their cure."""

from __future__ import annotations

import difflib
import http.client
import json
import re
import ssl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from serverlessllm import __version__
from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 630.0
"""Longer than the longest wait for a cold model: the server decides, not the client."""


class _Error(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error


class Client:
    """One server; a connection per call (a verb makes few)."""

    def __init__(self, url: str, api_key: str | None = None, ca: str | None = None) -> None:
        """`ca` is a file of certificates to trust; None: the system's."""
        if url.startswith("unix:"):
            raise Failure(
                f"{url}: verbs ask over http and https, not through a unix socket",
                "name an address by --url or SLLM_URL, or let `sllm serve` listen on one",
                exit_status=2,
            )
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._host, self._port = parts.hostname, parts.port
        except ValueError:  # a port that is none
            parts = urlsplit("")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise Failure(
                f"{url!r} is not a server's address: write http://host:port",
                "look at --url and SLLM_URL",
                exit_status=2,
            )
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._tls = _tls(ca) if parts.scheme == "https" else None
        self._headers = {"User-Agent": f"sllm/{__version__}", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str, answer: type[T]) -> T:
        return self._whole("GET", path, None, answer)

    def post(self, path: str, body: msgspec.Struct, answer: type[T]) -> T:
        return self._whole("POST", path, body, answer)

    def delete(self, path: str, answer: type[T]) -> T:
        return self._whole("DELETE", path, None, answer)

    def lines(self, path: str, body: object) -> Generator[bytes]:
        """The lines of a streamed answer (NDJSON or SSE), as they come, without their ends."""
        with self._ask("POST", path, body) as response:
            while line := response.readline():
                yield line.rstrip(b"\r\n")

    def stream(self, path: str, body: object, line: type[T]) -> Iterator[T]:
        """The typed lines of an NDJSON answer; an error after the first line is raised."""
        decoder = msgspec.json.Decoder(line)
        for text in self.lines(path, body):
            if not text:
                continue
            if text.startswith(b'{"error"'):
                raise _failure(0, text, self)
            yield decoder.decode(text)

    def _whole(self, method: str, path: str, body: object, answer: type[T]) -> T:
        with self._ask(method, path, body) as response:
            data = response.read()
        try:
            return msgspec.json.decode(data, type=answer)
        except msgspec.MsgspecError as error:
            raise Failure(
                f"{self.url} answers something else than a ServerlessLLM server: {error}",
                "check --url, and that client and server have the same version",
            ) from error

    @contextmanager
    def _ask(self, method: str, path: str, body: object) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        data = None if body is None else msgspec.json.encode(body)
        headers = self._headers | ({"Content-Type": "application/json"} if data else {})
        try:
            self._connect(connection)
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            with response:
                if response.status >= 400:
                    raise _failure(response.status, response.read(1 << 20), self)
                yield response
        except http.client.RemoteDisconnected as error:
            cure = "see its log" if self._tls else "see its log; is it https that is served there?"
            raise Failure(f"{self.url} closed the connection without an answer", cure) from error
        except (OSError, http.client.HTTPException) as error:
            raise Failure(
                f"the server at {self.url} went away: {_reason(error)}",
                "see its log; `sllm ps` tells whether it is back",
            ) from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        assert self._host is not None
        where, timeout_s = (self._host, self._port), _CONNECT_TIMEOUT_S
        if self._tls is None:
            return http.client.HTTPConnection(*where, timeout=timeout_s)
        return http.client.HTTPSConnection(*where, timeout=timeout_s, context=self._tls)

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            cure = "name the certificates to trust: `sllm --ca FILE …`, or SLLM_CA"
            if "not valid for" in error.verify_message:
                cure = "ask for the server by a name in its certificate: --url or SLLM_URL"
            raise Failure(
                f"the certificate of {self.url} is not trusted: {error.verify_message.rstrip('.')}",
                cure,
            ) from error
        except ssl.SSLError as error:
            raise Failure(
                f"{self.url} does not speak https ({_reason(error)})", "look at --url and SLLM_URL"
            ) from error
        except OSError as error:
            raise Failure(
                f"no server answers at {self.url} ({_reason(error)})",
                "start one with `sllm serve`, or name another by --url or SLLM_URL",
            ) from error
        connection.sock.settimeout(_ANSWER_TIMEOUT_S)


def connect(url: str | None) -> Client:
    """The server that `--url`, `SLLM_URL` or the settings name."""
    from serverlessllm.config.listen import parse_listen
    from serverlessllm.config.load import client_api_key, client_ca, client_url

    given = options.CA_FILE.get()
    ca = client_ca() if given is None else str(given)
    url = url or client_url()
    if url is None:
        ours = options.settings().settings.orchestrator
        url = parse_listen(ours.listen, allow_remote=True).replace("//0.0.0.0:", "//127.0.0.1:")
        if ours.tls_certificate is not None:
            url = url.replace("http://", "https://", 1)
            ca = ca or ours.tls_certificate
    return Client(url, client_api_key(), ca)


def model_path(prefix: str, model: str) -> str:
    """`/api/models` and a model's name, safe inside a path."""
    return f"{prefix}/{quote(model, safe='/@')}"


def _tls(ca: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl's own among them
        raise Failure(
            f"{ca}: no certificates can be read there ({_reason(error)})",
            "look at --ca and SLLM_CA",
            exit_status=2,
        ) from error


def _reason(error: Exception) -> str:
    """In a few words, without a number."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower() if error.errno else error.strerror
    return type(error).__name__


def _failure(status: int, body: bytes, client: Client) -> Failure:
    try:
        error = msgspec.json.decode(body, type=_ErrorBody).error
    except msgspec.MsgspecError:
        return Failure(
            f"{client.url} answers with status {status}, and not as a ServerlessLLM server does",
            "look at --url and SLLM_URL",
        )
    return Failure(error.message, cure(error.code, error.message, client), code=error.code)


def cure(code: str | None, message: str, client: Client) -> str:
    """What to do about an error of this code; empty where its message says all."""
    match code:
        case "model_not_found":
            asked = re.match(r"the model '([^']+)'", message)
            if asked is None:  # there is a model, but its source has nothing
                return "look at the name and at --source"
            near = _near(asked[1], client)
            return (f"did you mean {near}? " if near else "") + (
                "`sllm ls` lists the models; `sllm pull NAME --source URL` adds one"
            )
        case "not_found":
            return f"is {client.url} a ServerlessLLM server? look at --url and SLLM_URL"
        case "invalid_api_key":
            return (
                "set SLLM_API_KEY; `sllm key create NAME --scope admin` makes a key for these verbs"
            )
        case "insufficient_scope":
            return "set SLLM_API_KEY to a key of that scope: `sllm key create NAME --scope …`"
        case "no_capacity":
            return (
                "`sllm ps` shows the agents and what runs; `sllm unload MODEL` makes room, "
                "`sllm agent` adds one"
            )
        case "load_failed":
            return "more is in the server's log, and in logs/AGENT/ of the data directory"
        case "conflict":
            return "`sllm rm NAME` makes room for another of that name"
        case "metadata_unavailable" | "store_unavailable" | "backend_crash_loop":
            return "`sllm doctor` tells what is wrong"
    return ""


def _near(asked: str, client: Client) -> str | None:
    """The registered name nearest to it."""
    try:
        listing = client.get("/v1/models", dict)
    except Failure:
        return None
    names = [str(row.get("id")) for row in listing.get("data", [])]
    return next(iter(difflib.get_close_matches(asked, names, n=1, cutoff=0.4)), None)


def chat_deltas(lines: Iterator[bytes]) -> Iterator[tuple[str, str]]:
    """(`text`, delta) and (`comment`, JSON) of an SSE chat; an error event is raised."""
    for line in lines:
        if line.startswith(b": "):
            yield "comment", line[2:].decode(errors="replace")
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise Failure(str(event["error"].get("message", "the answer broke off")))
        for choice in event.get("choices", ()):
            if text := choice.get("delta", {}).get("content"):
                yield "text", text
