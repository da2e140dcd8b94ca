"""What a key may use in a minute: buckets that refill evenly, in this process's memory.

A request takes one request and an estimate of its tokens when it is admitted; when its answer has
ended, what it really used is known and the difference is given back, or taken: a bucket may be in
debt, and then nobody is admitted until the debt is paid. Several processes that serve one front
door have a bucket each, and tell each other what was spent (`Quotas.spent_since`, `note_others`):
between two exchanges they may together admit more than the limit, and pay it back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Final

from serverlessllm.core.agentapi import USAGE_HEADER
from serverlessllm.core.apikeys import ApiKey
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import TooManyRequests
from serverlessllm.core.ids import KeyId

_MINUTE_S: Final = 60.0
_BODY_BYTES_PER_TOKEN: Final = 4
_EVENT_BYTES_PER_TOKEN: Final = 256
"""Of a stream that broke off: an event of one token is seldom shorter."""
_USAGE: Final = f"\r\n{USAGE_HEADER}: ".encode()
_COUNT_DIGITS_MAX: Final = 12
_AT_ONCE_RETRY_S: Final = 1.0

Spent = tuple[int, int]
"""Requests, tokens."""


class RequestsLimited(TooManyRequests):
    """The key's limit of requests is reached."""

    type = "requests"
    code = "rate_limit_exceeded"


class TokensLimited(TooManyRequests):
    """The key's limit of tokens is reached."""

    type = "tokens"
    code = "rate_limit_exceeded"


class Bucket:
    """`per_minute` units at most, which come back evenly over a minute."""

    __slots__ = ("_at_s", "_before_left", "_before_reset", "_rate", "left", "per_minute")

    def __init__(self, name: str, per_minute: int, now_s: float) -> None:
        """`name` is what the header fields call its units."""
        self.per_minute = per_minute
        self.left = float(per_minute)
        """As of the last look; negative: in debt."""
        self._rate = per_minute / _MINUTE_S
        self._at_s = now_s
        self._before_left = (
            f"x-ratelimit-limit-{name}: {per_minute}\r\nx-ratelimit-remaining-{name}: "
        )
        self._before_reset = f"\r\nx-ratelimit-reset-{name}: "

    def look(self, now_s: float) -> float:
        """What is left now."""
        left = self.left + (now_s - self._at_s) * self._rate
        self._at_s = now_s
        if left > self.per_minute:
            left = float(self.per_minute)
        self.left = left
        return left

    def missing(self, now_s: float) -> int:
        """How much of a full bucket is not left now."""
        return math.ceil(self.per_minute - self.look(now_s))

    def take(self, units: float, now_s: float) -> None:
        """Take from what is left (or give back, if negative). Whatever came back by now is not for
        these units: a bucket that was full is no fuller for having waited."""
        self.left = min(float(self.per_minute), self.look(now_s) - units)

    def wait_s(self, units: float) -> float:
        """From the last look until `units` (at most all of them) are left."""
        return max(0.0, (units - self.left) / self._rate)

    def lines(self, now_s: float) -> bytes:
        """The header lines that tell a client what it has left."""
        left = self.look(now_s)
        units = int(left) if left > 0 else 0
        wait = reset((self.per_minute - left) / self._rate)
        return f"{self._before_left}{units}{self._before_reset}{wait}\r\n".encode()


class Usage:
    """What one limited key has left, and what it has running."""

    __slots__ = ("_clock", "_moved", "at_once_max", "id", "requests", "running", "spent_requests",
                 "spent_tokens", "tokens")  # fmt: skip

    def __init__(self, key: ApiKey, clock: Clock, moved: dict[KeyId, Usage]) -> None:
        now_s = clock.now_s()
        rpm, tpm = key.requests_per_minute, key.tokens_per_minute
        self.id = key.id
        self.requests = None if rpm is None else Bucket("requests", rpm, now_s)
        self.tokens = None if tpm is None else Bucket("tokens", tpm, now_s)
        self.at_once_max = math.inf if key.requests_at_once is None else key.requests_at_once
        self.running = 0
        self.spent_requests = self.spent_tokens = 0
        """Since `Quotas.spent_since` was last asked."""
        self._clock = clock
        self._moved = moved

    def admit(self, body_bytes: int, answer_tokens_max: int | None) -> Admission:
        """Let a request in, to be closed when it has ended.

        Raises:
            RequestsLimited, TokensLimited: when to come back is in them.
        """
        if self.running >= self.at_once_max:
            raise RequestsLimited(
                f"this API key may have {self.at_once_max} requests running at once",
                retry_after_s=_AT_ONCE_RETRY_S,
            )
        now_s = self._clock.now_s()
        requests, tokens = self.requests, self.tokens
        if requests is not None and requests.look(now_s) < 1:
            raise RequestsLimited(
                f"this API key may send {requests.per_minute} requests a minute",
                retry_after_s=requests.wait_s(1),
            )
        reserved = prompt = 0
        if tokens is not None:
            prompt = body_bytes // _BODY_BYTES_PER_TOKEN
            wanted = prompt + (answer_tokens_max or 0)
            # What is more than a whole minute's must not be refused for ever.
            reserved = min(wanted, tokens.per_minute)
            if tokens.look(now_s) < reserved:
                raise TokensLimited(
                    f"this API key may use {tokens.per_minute} tokens a minute, and this request "
                    f"asks for up to {wanted}",
                    retry_after_s=tokens.wait_s(reserved),
                )
            tokens.left -= reserved
        if requests is not None:
            requests.left -= 1
        self.running += 1
        self._remember(1, reserved)
        return Admission(self, reserved, prompt)

    def spend(self, requests: int, tokens: int) -> None:
        """Take from what is left (or give back, if negative), and remember it for the others."""
        self.note_others(requests, tokens)
        self._remember(requests, tokens)

    def _remember(self, requests: int, tokens: int) -> None:
        self.spent_requests += requests
        self.spent_tokens += tokens
        self._moved[self.id] = self

    def note_others(self, requests: int, tokens: int) -> None:
        """Take from what is left what other processes spent."""
        now_s = self._clock.now_s()
        if self.requests is not None and requests:
            self.requests.take(requests, now_s)
        if self.tokens is not None and tokens:
            self.tokens.take(tokens, now_s)

    def missing(self) -> Spent:
        """What is missing of a full minute, but for what `Quotas.spent_since` will still tell."""
        now_s = self._clock.now_s()
        return (
            0 if self.requests is None else self.requests.missing(now_s) - self.spent_requests,
            0 if self.tokens is None else self.tokens.missing(now_s) - self.spent_tokens,
        )

    def lines(self, now_s: float) -> bytes:
        """The header lines that tell a client what it has left."""
        requests, tokens = self.requests, self.tokens
        if tokens is None:
            return b"" if requests is None else requests.lines(now_s)
        return (
            tokens.lines(now_s) if requests is None else requests.lines(now_s) + tokens.lines(now_s)
        )


class Admission:
    """One request of a limited key while it runs; a context manager."""

    __slots__ = ("_prompt", "_reserved", "_usage")

    def __init__(self, usage: Usage, reserved: int, prompt: int) -> None:
        self._usage: Usage | None = usage
        self._reserved = reserved
        self._prompt = prompt

    def settle(self, tokens: int) -> None:
        """What it used is known: `tokens` instead of the estimate."""
        if self._usage is not None:
            self._usage.spend(0, tokens - self._reserved)
            self._reserved = tokens

    def broke_off(self, passed_bytes: int) -> None:
        """Its answer ended without saying what it used, after so many bytes of it."""
        self.settle(self._prompt + passed_bytes // _EVENT_BYTES_PER_TOKEN)

    def close(self, *, answered: bool) -> None:
        """The request has ended; one that was not answered has used no tokens. Idempotent."""
        usage = self._usage
        if usage is not None:
            if not answered:
                self.settle(0)
            usage.running -= 1
            self._usage = None

    def __enter__(self) -> Admission:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(answered=kind is None)


class Quotas:
    """The usage of every limited key that this process has met."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._usages: dict[KeyId, tuple[ApiKey, Usage]] = {}
        self._moved: dict[KeyId, Usage] = {}
        """Those that spent since they were last asked."""

    def of(self, key: ApiKey) -> Usage | None:
        """The key's usage, begun anew when its limits have changed; None: it has no limits."""
        if not key.limited:
            return None
        known = self._usages.get(key.id)
        if known is None or known[0] != key:
            known = self._usages[key.id] = (key, Usage(key, self._clock, self._moved))
        return known[1]

    def keep_only(self, keys: Mapping[KeyId, object]) -> None:
        """Forget the usage of keys that are gone."""
        for key in self._usages.keys() - keys.keys():
            del self._usages[key]

    def spent_since(self) -> dict[KeyId, Spent]:
        """What each key spent in this process since this was last asked."""
        spent = {
            key: (usage.spent_requests, usage.spent_tokens) for key, usage in self._moved.items()
        }
        for usage in self._moved.values():
            usage.spent_requests = usage.spent_tokens = 0
        self._moved.clear()
        return spent

    def missing(self) -> dict[KeyId, Spent]:
        """For a process that begins: what it has not heard that others spent."""
        found = {key: usage.missing() for key, (_, usage) in self._usages.items()}
        return {key: spent for key, spent in found.items() if spent != (0, 0)}

    def note_others(self, spent: Mapping[KeyId, Spent]) -> None:
        """What keys spent in other processes; of a key not met here it is not kept."""
        for key, (requests, tokens) in spent.items():
            known = self._usages.get(key)
            if known is not None:
                known[1].note_others(requests, tokens)


def tokens_used(head: bytes, trailers: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens, as an agent's answer says in its head or its trailers."""
    lines = b"\r\n" + trailers if trailers else head
    start = lines.find(_USAGE)
    if start < 0:
        return None
    start += len(_USAGE)
    prompt, _, completion = lines[start : lines.find(b"\r\n", start)].partition(b" ")
    if not (_is_count(prompt) and _is_count(completion)):
        return None
    return int(prompt), int(completion)


def _is_count(digits: bytes) -> bool:
    return len(digits) <= _COUNT_DIGITS_MAX and digits.isdigit()


def reset(wait_s: float) -> str:
    """A duration as the OpenAI API writes it: `850ms`, `7s`, `6m0s`."""
    if wait_s < 1:
        return f"{math.ceil(wait_s * 1000)}ms"
    seconds = math.ceil(wait_s)
    return f"{seconds}s" if seconds < 60 else f"{seconds // 60}m{seconds % 60}s"
