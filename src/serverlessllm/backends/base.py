"""The seam of a backend: an adapter that decides and describes; the agent starts and watches.

An adapter is a stateless value; what it cannot do it says (`Refusal`).
`serverlessllm.testing.contracts.backend` proves each one. Third parties register a factory under
the entry-point group `serverlessllm.backends`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from serverlessllm.checkpoint.index import Index
from serverlessllm.core.ids import Address, InstanceId
from serverlessllm.core.models import ModelSpec

READY_FD = "SLLM_READY_FD"
"""Variable: the descriptor to write a newline to when requests may come."""
WEIGHTS_FD = "SLLM_WEIGHTS_FD"
"""Variable: the checkpoint's `.bin` in DRAM, read-only, at its full size."""
ARRIVALS_FD = "SLLM_ARRIVALS_FD"
"""Variable: a pipe's read end. The number of each chunk that has arrived and verified comes as 4
bytes, little-endian; then `ALL_ARRIVED`. Its end before that: the load failed, and so must the
engine. Absent: everything is there."""
ALL_ARRIVED = 0xFFFF_FFFF


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent's machine offers to an instance."""

    cpus: int
    dram_free_bytes: int
    devices: tuple[str, ...] = ("cpu",)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """The backend can serve the model, at this cost."""

    memory_bytes: int
    """Beside the weights: KV cache and scratch of one instance."""
    slots: int
    """Requests one instance runs at once."""
    layered: bool = False
    """It may be started while its checkpoint still moves to DRAM, and waits for each layer."""
    template: str | None = None
    """Of the `LaunchPlan` to come: to be got ready while the bytes move."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The backend cannot serve the model; the reason ends up in the client's message."""

    reason: str


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is to be started with."""

    instance: InstanceId
    spec: ModelSpec
    index: Index | None
    model_path: Path | None
    """The `.bin` in DRAM (`/dev/shm`), read-only; None for a model without a checkpoint."""
    index_path: Path | None
    run_dir: Path
    """0700, short enough for a unix socket's path; the instance's own."""
    node: Node
    slots: int
    arriving: bool = False
    """The checkpoint still moves: `model_path` may be renamed at any time, so the engine reads
    the descriptor that `SLLM_WEIGHTS_FD` names, and of it only what `SLLM_ARRIVALS_FD` told."""


class LaunchPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How the agent starts an instance and knows that it is ready."""

    command: tuple[str, ...]
    """Empty: nothing to start, `address` is somebody else's server."""
    environment: dict[str, str] = {}
    """Added to a clean base environment; never credentials."""
    address: Address
    ready_path: str = "/health"
    """GET answers 200 when ready, anything else (or no connection) before."""
    ready_timeout_s: float = 120.0
    template: str | None = None
    """Module of `backends.inside` whose template process forks the instance: its `preload()` runs
    once in the template, its `main(argument)` in each fork, `argument` being `command`'s last
    word. None, or no template to be had: `command` is executed."""
    tells_ready: bool = False
    """The command writes a newline to the descriptor that `SLLM_READY_FD` names once it is
    ready; else readiness can only be probed for."""
    idle_connection_s: float = 4.0
    """The server closes idle connections after this or later: pool expiry stays below."""


class BackendStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a running instance says of itself."""

    running: int = 0
    queued: int = 0
    kv_hit_rate: float = 0.0
    """Share of all prompt tokens so far that came from the KV cache, 0..1."""
    progress: int | None = None
    """A count that grows whenever the engine gets work done; None: the engine has none."""


class Backend(Protocol):
    """One engine."""

    @property
    def name(self) -> str: ...

    def installed(self) -> Refusal | None:
        """None when the engine is there; else why not and how to install it (`sllm doctor`)."""
        ...

    def can_serve(self, spec: ModelSpec, index: Index | None, node: Node) -> Offer | Refusal: ...

    def launch(self, launch: Launch) -> LaunchPlan: ...

    @property
    def stats_path(self) -> str | None:
        """GET path of the engine's own figures; None when it has none."""
        ...

    def parse_stats(self, body: bytes) -> BackendStats:
        """Read what `stats_path` answered."""
        ...
