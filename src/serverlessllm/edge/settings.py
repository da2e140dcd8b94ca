"""Limits and deadlines of the streaming proxy; each has its unit in its name."""

from __future__ import annotations

import msgspec

from serverlessllm.core.units import KIB, MIB


class EdgeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may do to the listener."""

    connections_max: int = 4096
    """Open client connections; the next one is answered 503 and closed."""
    backlog: int = 1024
    """Connections that the kernel holds before they are accepted."""
    header_bytes_max: int = 32 * KIB
    """Request line and headers together; more is 431."""
    headers_max: int = 100
    """Distinct header names of one request; more is 431."""
    body_bytes_max: int = 4 * MIB
    """Of one request; more is 413. Parsing the most hostile JSON of this size holds the event loop
    for less than 10 ms."""
    pipeline_max: int = 16
    """Requests read ahead on one connection before reading pauses."""
    header_timeout_s: float = 10.0
    """From a request's first byte to the end of its headers."""
    body_timeout_s: float = 30.0
    """From the end of the headers to the end of the body."""
    body_rate_min_bytes_s: int = KIB
    """A body that comes slower (after `body_rate_grace_s`) is 408."""
    body_rate_grace_s: float = 5.0
    """Time before the rate of a body is judged."""
    idle_timeout_s: float = 60.0
    """A kept connection without a request is closed after this."""
    write_buffer_bytes_max: int = 256 * KIB
    """Unsent bytes of one connection before whoever writes must wait."""
    write_stall_timeout_s: float = 60.0
    """A client that takes none of its waiting bytes for so long is cut."""
    swallow_s: float = 0.5
    """After an answer that leaves request bytes unread: time to read them away before closing,
    so that the client sees the answer and not a reset."""
    sweep_interval_s: float = 1.0
    """How often all deadlines are looked at; a deadline is this precise."""
    drain_accept_s: float = 2.0
    """How long a draining server still accepts, until balancers have seen it is not ready."""
    drain_cut_s: float = 2.0
    """Time that cancelled handlers have to say goodbye at the end of a drain."""


class UpstreamSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the pool of upstream connections may hold, and how long it waits."""

    connections_per_address_max: int = 1024
    """Open connections to one address; further requests wait for one."""
    waiters_per_address_max: int = 1024
    """Requests that wait for a connection to one address; more are refused as busy."""
    idle_expiry_s: float = 4.0
    """A kept connection is not used after so long: below the peers' own (llama.cpp: 5 s)."""
    connect_timeout_s: float = 5.0
    """Until the connection stands."""
    head_bytes_max: int = 64 * KIB
    """Status line and headers of an answer; more is a protocol error."""
    buffer_bytes_max: int = 256 * KIB
    """Bytes of an answer that nobody has taken yet before reading pauses."""
    line_bytes_max: int = MIB
    """Of one line for `Response.lines` (an SSE event, a load event)."""
    sweep_interval_s: float = 1.0
    """How often idle connections and deadlines are looked at; a deadline is this precise."""
