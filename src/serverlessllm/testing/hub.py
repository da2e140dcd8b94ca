"""A stand-in for the Hugging Face hub that satisfies the real `huggingface_hub` library.

```python
with HubServer() as hub:
    hub.add("org/name", {"config.json": b"{}", "model.safetensors": path})
    environment = {"HF_ENDPOINT": hub.url}  # before `huggingface_hub` is imported
```

Faults are set while it runs: `hub.faults = Faults(status=429)`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import unquote, urlsplit

import msgspec

_BLOCK_BYTES = 64 * 1024


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """What goes wrong, or slowly, with each answer."""

    status: int | None = None
    """Answer with this error status: 401, 403 (gated), 404, 429, 5xx."""
    files_only: bool = False
    """The status and the cut strike the bytes of files, not the API."""
    times: int | None = None
    """Strike so many requests only; None: all."""
    cut_bytes: int | None = None
    """Close the connection after so many bytes of a file's body."""
    latency_s: float = 0.0
    """Wait before each answer."""
    bytes_s: float | None = None
    """Bandwidth of each connection."""
    redirect: bool = False
    """Files are answered by a redirect to a signed URL, as the hub does for large ones."""


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """One model: its files at one commit."""

    commit: str
    files: dict[str, bytes | Path]
    license: str | None = None
    gated: bool = False


class HubServer:
    """An HTTP server on a free port of 127.0.0.1, in threads of this process."""

    SECRET: ClassVar[str] = "Signature=s3cr3t"  # noqa: S105 - a test's own
    """In every signed URL: must never show up in a message or a log."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.requests: Counter[str] = Counter()
        """Answers by kind: `api`, `head`, `file`, `fault`."""
        self.bytes_sent = 0
        self.tokens: set[str] = set()
        """Authorization headers seen."""
        self.gate = threading.Event()
        """Cleared, it holds every file's bytes back until it is set again."""
        self.gate.set()
        self._repositories: dict[str, Repository] = {}
        self._struck = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """For `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self,
        name: str,
        files: Mapping[str, bytes | Path],
        *,
        license_id: str | None = "apache-2.0",
        gated: bool = False,
    ) -> str:
        """Publish a model, or a new commit of it; the commit's id."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path, content in sorted(files.items()):
            digest.update(path.encode())
            digest.update(content if isinstance(content, bytes) else content.read_bytes())
        commit = digest.hexdigest()
        self._repositories[name] = Repository(
            commit=commit, files=dict(files), license=license_id, gated=gated
        )
        return commit

    def reset(self) -> None:
        """Forget every model, fault and figure."""
        self.faults = Faults()
        self.requests.clear()
        self.bytes_sent = 0
        self.tokens.clear()
        self.gate.set()
        self._repositories.clear()
        self._struck = 0

    def repository(self, name: str) -> Repository | None:
        """The model of that name."""
        return self._repositories.get(name)

    def strike(self, *, is_file: bool) -> Faults | None:
        """The faults if they apply to this request; each application counts."""
        faults = self.faults
        if (faults.files_only and not is_file) or (
            faults.status is None and faults.cut_bytes is None
        ):
            return None
        with self._lock:
            if faults.times is not None and self._struck >= faults.times:
                return None
            self._struck += 1
        return faults

    def count(self, kind: str, size_bytes: int = 0) -> None:
        """Note an answer."""
        with self._lock:
            self.requests[kind] += 1
            self.bytes_sent += size_bytes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    hub: HubServer
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves in the middle is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 30
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub = self.server.hub
        if hub.faults.latency_s:
            time.sleep(hub.faults.latency_s)
        if authorization := self.headers.get("authorization"):
            hub.tokens.add(authorization)
        path = unquote(urlsplit(self.path).path).removeprefix("/cdn")
        is_file = "/resolve/" in path
        struck = hub.strike(is_file=is_file)
        if struck is not None and struck.status is not None:
            self._refuse(struck.status, "")
        elif path.startswith("/api/models/"):
            self._answer_api(path.removeprefix("/api/models/"))
        elif is_file:
            cut_bytes = struck.cut_bytes if struck is not None else None
            self._answer_file(path.strip("/"), with_body=with_body, cut_bytes=cut_bytes)
        else:
            self._refuse(404, "")

    def _answer_api(self, path: str) -> None:
        name, _, rest = path.partition("/revision/")
        repository = self.server.hub.repository(name)
        if repository is None:
            self._refuse(404 if "authorization" in self.headers else 401, "RepoNotFound")
            return
        if rest and rest not in {"main", repository.commit}:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [
            {
                "rfilename": file,
                "size": _size(content),
                "blobId": hashlib.sha1(file.encode(), usedforsecurity=False).hexdigest(),
            }
            for file, content in sorted(repository.files.items())
        ]
        body = json.dumps(
            {
                "_id": repository.commit[:24],
                "id": name,
                "modelId": name,
                "sha": repository.commit,
                "private": False,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [f"license:{repository.license}"] if repository.license else [],
                "cardData": {"license": repository.license} if repository.license else {},
                "siblings": siblings,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "lastModified": "2026-01-01T00:00:00.000Z",
            }
        ).encode()
        self.server.hub.count("api")
        self._head(200, len(body), {"content-type": "application/json"})
        self.wfile.write(body)

    def _answer_file(self, path: str, *, with_body: bool, cut_bytes: int | None) -> None:
        hub = self.server.hub
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = hub.repository(name)
        if repository is None:
            self._refuse(404, "RepoNotFound")
        elif repository.gated and "authorization" not in self.headers:
            self._refuse(403, "GatedRepo")
        elif revision not in {"main", repository.commit}:
            self._refuse(404, "RevisionNotFound")
        elif file not in repository.files:
            self._refuse(404, "EntryNotFound")
        elif hub.faults.redirect and not self.path.startswith("/cdn"):
            self._head(302, 0, {"location": f"{hub.url}/cdn/{path}?{hub.SECRET}"})
        else:
            self._send_file(repository, file, with_body=with_body, cut_bytes=cut_bytes)

    def _send_file(
        self, repository: Repository, file: str, *, with_body: bool, cut_bytes: int | None
    ) -> None:
        hub = self.server.hub
        content = repository.files[file]
        size = _size(content)
        start, end = self._range(size)
        headers = {
            "etag": f'"{hashlib.sha1(file.encode(), usedforsecurity=False).hexdigest()}"',
            "last-modified": "Thu, 01 Jan 2026 00:00:00 GMT",
            "x-repo-commit": repository.commit,
            "accept-ranges": "bytes",
            "content-type": "application/octet-stream",
        }
        if "range" in self.headers:
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
        self._head(206 if "content-range" in headers else 200, end - start, headers)
        if not with_body:
            hub.count("head")
            return
        hub.gate.wait(30)
        sent = 0
        for block in _blocks(content, start, end):
            if cut_bytes is not None and sent + len(block) > cut_bytes:
                self.wfile.write(block[: cut_bytes - sent])
                self.close_connection = True
                hub.count("fault", cut_bytes)
                return
            self.wfile.write(block)
            sent += len(block)
            if hub.faults.bytes_s is not None:
                time.sleep(len(block) / hub.faults.bytes_s)
        hub.count("file", sent)

    def _range(self, size: int) -> tuple[int, int]:
        text = self.headers.get("range", "").removeprefix("bytes=")
        if not text:
            return 0, size
        first, _, last = text.partition("-")
        return int(first), min(int(last) + 1 if last else size, size)

    def _refuse(self, status: int, code: str) -> None:
        headers = {"x-error-code": code, "x-error-message": code} if code else {}
        if status == 401 and "authorization" in self.headers:
            headers["x-error-message"] = "Invalid credentials in Authorization header"
        if status == 429:
            headers["retry-after"] = "1"
        self.server.hub.count("fault")
        body = b'{"error":"refused"}'
        self._head(status, len(body), {**headers, "content-type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, size_bytes: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(size_bytes))
        self.end_headers()


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _blocks(content: bytes | Path, start: int, end: int) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for at in range(start, end, _BLOCK_BYTES):
            yield content[at : min(at + _BLOCK_BYTES, end)]
        return
    with content.open("rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(_BLOCK_BYTES, end - start))):
            start += len(block)
            yield block
