"""An engine that computes nothing: deterministic tokens, times and faults as asked, real HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec

from serverlessllm.backends.base import (
    BackendStats,
    Launch,
    LaunchPlan,
    Node,
    Offer,
    Refusal,
)
from serverlessllm.backends.dialect import Dialect, Operation, PlainDialect
from serverlessllm.backends.options import parse_options
from serverlessllm.checkpoint.index import Index
from serverlessllm.core.ids import Address
from serverlessllm.core.models import ModelSpec
from serverlessllm.core.units import MIB

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class FakeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `ModelSpec.options` may say for this backend."""

    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 4
    """Requests answered at once; more wait."""
    memory_bytes: _Count = 16 * MIB
    """What it claims to take."""
    start_s: _Seconds = 0.0
    """From the process's start to ready."""
    first_token_s: _Seconds = 0.0
    """From a request's start to its first token."""
    token_s: _Seconds = 0.0
    """Between two tokens."""
    tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 16
    """Length of an answer, where the request does not ask for less."""
    fail_start: bool = False
    """Exit with status 3 instead of becoming ready."""
    crash_at_token: _Count | None = None
    """Die by SIGKILL before the token of this number (0: before the first)."""
    hang_at_token: _Count | None = None
    """Stop the process (SIGSTOP) before the token of this number."""
    nonsense_at_token: _Count | None = None
    """Cut the connection in the middle of an event before the token of this number."""
    flood_bytes: _Count = 0
    """Print so much at each request."""
    layered: bool = False
    """Start while the checkpoint still moves. Each chunk of it stands for a layer: the token of a
    number is read from the chunk of that number (its CRC32C), once that is there."""
    template: bool = False
    """Fork it from a template process."""


class Fake:
    """Serves a model whose spec names it: never chosen by itself."""

    name = "fake"
    stats_path = "/stats"

    def installed(self) -> Refusal | None:
        return None

    def can_serve(self, spec: ModelSpec, index: Index | None, node: Node) -> Offer | Refusal:
        del node
        if spec.backend != self.name:
            return Refusal(reason="makes its answers up: only for models that name it")
        options = parse_options(spec.options, FakeOptions)
        if isinstance(options, Refusal):
            return options
        if options.layered and index is None:
            return Refusal(reason="layered: true needs a checkpoint, whose chunks are its layers")
        return Offer(
            memory_bytes=options.memory_bytes,
            slots=options.slots,
            layered=options.layered,
            template=self.name if options.template else None,
        )

    def launch(self, launch: Launch) -> LaunchPlan:
        options = parse_options(launch.spec.options, FakeOptions)
        if isinstance(options, Refusal):
            raise AssertionError("launch without can_serve")
        address = Address(f"unix:{launch.run_dir / 'backend.sock'}")
        return LaunchPlan(
            command=fake_command(
                address,
                launch.spec.model,
                options,
                launch.index_path if options.layered else None,
            ),
            address=address,
            template=self.name if options.template else None,
            tells_ready=True,
        )

    def dialect(self, spec: ModelSpec) -> Dialect:
        """`backends.dialect.Speaks`: all of it, as it stands."""
        del spec
        return PlainDialect(operations=frozenset(Operation))

    def parse_stats(self, body: bytes) -> BackendStats:
        return msgspec.json.decode(body, type=BackendStats)


def fake_command(
    address: Address, model: str, options: FakeOptions, index_path: Path | None = None
) -> tuple[str, ...]:
    """How to start the fake's server by hand, on `unix:/path` or `http://host:port`; `index_path`
    only with `layered`."""
    asked = msgspec.json.encode(options).decode()
    module = "serverlessllm.backends.inside.fake"
    words = (address, model, asked, *(() if index_path is None else (str(index_path),)))
    if options.template:  # a fork is given one word
        words = (msgspec.json.encode(words).decode(),)
    return (sys.executable, "-m", module, *words)
