"""The document and the page that shows it, from this process alone: no other server is asked."""

from __future__ import annotations

import asyncio
import gzip
from importlib import resources

from serverlessllm.core.errors import RouteNotFound
from serverlessllm.edge.server import Request
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.rest.documents.describe import describe
from serverlessllm.orchestrator.rest.route import GET, Route

_OK = 200
_BELOW = "/docs/"
_FILES = {
    "scalar-1.72.1.js": ("text/javascript", "private, max-age=31536000, immutable"),
    "start.js": ("text/javascript", "no-cache"),
}
"""What `/docs/` holds: content type, and how long a browser may keep it."""
_SAFE = (
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
)
_SOURCES = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Documents:
    """`routes` are for the edge; nothing is made before it is asked for."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._document = b""
        self._files: dict[str, bytes] = {}
        self.routes = (
            Route(path="/openapi.json", methods=GET, serve=self._openapi, page=True),
            Route(path="/docs", methods=GET, serve=self._docs, page=True),
            Route(path=_BELOW, methods=GET, serve=self._file, page=True),
        )

    async def _openapi(self, request: Request) -> None:
        if not self._document:
            self._document = await asyncio.to_thread(describe, self._limits)
        headers = (("content-type", "application/json"), ("cache-control", "no-cache"), *_SAFE)
        request.respond(_OK, headers, self._document)

    async def _docs(self, request: Request) -> None:
        page = _read("docs.html")
        headers = (("content-type", "text/html; charset=utf-8"), ("cache-control", "no-cache"))
        request.respond(_OK, (*headers, ("content-security-policy", _SOURCES), *_SAFE), page)

    async def _file(self, request: Request) -> None:
        name = request.path.removeprefix(_BELOW)
        if name not in _FILES:
            raise RouteNotFound(f"there is no {request.path[:200]}")
        content_type, cached = _FILES[name]
        headers = [("content-type", content_type), ("cache-control", cached), *_SAFE]
        body = self._files.get(name)
        if body is None:
            body = self._files[name] = await asyncio.to_thread(_read, name)
        if body[:2] == b"\x1f\x8b":
            if "gzip" in (request.headers.get("accept-encoding") or ""):
                headers += [("content-encoding", "gzip"), ("vary", "accept-encoding")]
            else:
                body = await asyncio.to_thread(gzip.decompress, body)
        request.respond(_OK, headers, body)


def _read(name: str) -> bytes:
    """A file of this package, compressed where it lies so."""
    static = resources.files(__package__) / "static"
    packed = static / f"{name}.gz"
    return packed.read_bytes() if packed.is_file() else (static / name).read_bytes()
