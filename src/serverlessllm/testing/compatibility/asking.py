"""A client of one backend, and what its answers prove of a parameter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any

import msgspec

from serverlessllm.openai.errors import ErrorBody, ErrorFields
from serverlessllm.testing.contracts.backend import Running

_JSON = (("content-type", "application/json"),)
_CLIENT_ERROR = 400
_BAD_GATEWAY = 502

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"


class Verdict(StrEnum):
    """What a backend makes of a parameter."""

    YES = "yes"
    IGNORED = "ignored"
    """Answered as if it were not there."""
    REFUSED = "refused"
    """400, and the message says why."""
    FAILED = "failed"
    """502: the server, somebody else's, fails at it."""


class _Unanswered(Exception):
    def __init__(self, error: ErrorFields) -> None:
        super().__init__(error.message)
        self.error = error


class Refused(_Unanswered):
    """The backend refuses the request."""


class Failed(_Unanswered):
    """The backend cannot deal with the request, and does not say so."""


class Client:
    """Asks as an orchestrator does, through an agent's code."""

    def __init__(self, running: Running) -> None:
        self._running = running

    async def post(self, path: str, body: dict[str, object]) -> Any:
        """The decoded answer.

        Raises:
            Refused, Failed: an error in the contract's form.
        """
        sent = msgspec.json.encode({"model": "contract/model"} | body)
        running = self._running
        async with running.client.send(running.served, "POST", path, _JSON, sent) as response:
            got = await response.read()
            if response.status in {_CLIENT_ERROR, _BAD_GATEWAY}:
                error = msgspec.json.decode(got, type=ErrorBody).error
                assert error.message
                raise (Refused if response.status == _CLIENT_ERROR else Failed)(error)
            assert response.status == 200, got
            if body.get("stream"):
                return [
                    msgspec.json.decode(line[6:])
                    for line in got.split(b"\n")
                    if line.startswith(b"data: {")
                ]
            return msgspec.json.decode(got)

    async def chat(self, **fields: object) -> Any:
        messages = [{"role": "user", "content": "one two three"}]
        return await self.post(
            CHAT, {"messages": messages, "max_tokens": 12, "temperature": 0} | fields
        )

    async def say(self, **fields: object) -> str:
        """The text of a chat's answer."""
        text: str = (await self.chat(**fields))["choices"][0]["message"]["content"]
        return text

    async def complete(self, **fields: object) -> Any:
        asked = {"prompt": "one two", "max_tokens": 4, "temperature": 0}
        return await self.post(TEXT, asked | fields)

    async def embed(self, **fields: object) -> list[Any]:
        answer = await self.post(EMBEDDINGS, {"input": "one two"} | fields)
        return [row["embedding"] for row in answer["data"]]


Check = Callable[[Client], Awaitable[bool]]
"""Whether the parameter had its effect."""


class Behaviour(msgspec.Struct, frozen=True):
    """One row of the table."""

    group: str
    name: str
    check: Check


async def judge(behaviour: Behaviour, client: Client) -> Verdict:
    """Ask, and see."""
    try:
        return Verdict.YES if await behaviour.check(client) else Verdict.IGNORED
    except Refused:
        return Verdict.REFUSED
    except Failed:
        return Verdict.FAILED
