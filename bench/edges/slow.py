"""Clients that a gateway must not mind: they hold connections and hardly use them.

    python -m bench.edges.slow PORT IDLE SLOW [HEADER…]

IDLE connections are opened and say nothing. Of the SLOW ones a third drips its headers, a third
its body, and a third asks for a stream and reads a few bytes a second. Whoever is cut comes back.
Prints a line when all are connected and stays until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys

_PAUSE_S = 2.0
_SETTLE_S = 8.0
"""The slow readers' streams are as long as others': only then do they do nothing but wait."""
_SPREAD_S = 10.0
"""They come over a while: who cuts slow clients must not meet all of them again at one moment."""
_AT_ONCE = 64
_BODY = json.dumps(
    {"model": "mock", "messages": [{"role": "user", "content": "x" * 2000}], "stream": True}
).encode()


async def main(port: int, idle: int, slow: int, headers: list[str]) -> None:
    """Hold them all."""
    lines = "".join(f"{line}\r\n" for line in headers)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        f"content-type: application/json\r\n{lines}content-length: {len(_BODY)}\r\n\r\n"
    ).encode()
    turn, here = asyncio.Semaphore(_AT_ONCE), asyncio.Semaphore(0)
    async with asyncio.TaskGroup() as tasks:
        for number in range(idle + slow):
            kind = "idle" if number < idle else ("head", "body", "read")[number % 3]
            tasks.create_task(_stay(kind, port, head, turn, here))
        for _ in range(idle + slow):
            await here.acquire()
        await asyncio.sleep(_SETTLE_S)
        print("connected", flush=True)


async def _stay(
    kind: str, port: int, head: bytes, turn: asyncio.Semaphore, here: asyncio.Semaphore
) -> None:
    """One client, again and again."""
    await asyncio.sleep(random.uniform(0, _SPREAD_S))
    while True:
        async with turn:
            connection = socket.socket()
            connection.setblocking(False)
            if kind == "read":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        here.release()
        try:
            await _use(kind, connection, head)
        except OSError:
            await asyncio.sleep(_PAUSE_S)
        finally:
            connection.close()


async def _use(kind: str, connection: socket.socket, head: bytes) -> None:
    loop = asyncio.get_running_loop()
    if kind == "idle":
        await loop.sock_recv(connection, 1)
        return
    whole = head + _BODY
    if kind == "read":
        await loop.sock_sendall(connection, whole)
        while await loop.sock_recv(connection, 16):
            await asyncio.sleep(_PAUSE_S)
        return
    at = 0 if kind == "head" else len(head)
    await loop.sock_sendall(connection, whole[:at])
    while at < len(whole):
        await loop.sock_sendall(connection, whole[at : at + 1])
        at += 1
        await asyncio.sleep(_PAUSE_S)


if __name__ == "__main__":
    port, idle, slow = (int(word) for word in sys.argv[1:4])
    asyncio.run(main(port, idle, slow, sys.argv[4:]))
