"""The router that everybody writes first: an ASGI application on uvicorn with aiohttp's client.

python reference.py PORT UPSTREAM_PORT
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import aiohttp  # type: ignore[import-not-found] # it is only in the environment of its own
import uvicorn

_upstream = f"http://127.0.0.1:{sys.argv[2]}"


@functools.cache
def _session() -> aiohttp.ClientSession:
    """Made on first use: it wants a running loop."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Parse the request, pass it on, pass the answer back piece by piece."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    json.loads(body)
    url = _upstream + scope["path"]
    headers = {"content-type": "application/json"}
    async with _session().post(url, data=body, headers=headers) as answer:
        kind = answer.headers.get("content-type", "application/json").encode()
        start = {"type": "http.response.start", "status": answer.status}
        await send(start | {"headers": [(b"content-type", kind)]})
        async for piece in answer.content.iter_any():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
