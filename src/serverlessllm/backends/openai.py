"""Any server that speaks OpenAI: a command that starts one here, or the URL of one elsewhere."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from serverlessllm.backends.base import (
    BackendStats,
    Launch,
    LaunchPlan,
    Node,
    Offer,
    Refusal,
)
from serverlessllm.backends.dialect import Dialect
from serverlessllm.backends.openai_dialect import ForeignDialect
from serverlessllm.backends.options import parse_options
from serverlessllm.checkpoint.index import Index
from serverlessllm.core.ids import Address
from serverlessllm.core.models import ModelSpec
from serverlessllm.core.units import MIB

VARIABLES = {
    "socket": "path of the unix socket to listen on",
    "port": "port of 127.0.0.1 to listen on",
    "model": "the model's name, which requests carry",
    "model_path": "the checkpoint's .bin (a GGUF file for a GGUF source), in DRAM, read-only",
    "index_path": "the checkpoint's .idx",
    "slots": "requests that will be sent at once",
    "cpus": "cores the instance may use",
}
_VARIABLE = re.compile(r"\$(?:\$|\{([^}]*)\}|)")


class OpenAIOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `ModelSpec.options` may say for this backend."""

    slots: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 8
    """Requests sent to the server at once."""
    ready_path: Annotated[str, msgspec.Meta(pattern=r"^/\S*$")] | None = None
    """GET answers 200 when ready; `/health` of a command, `/v1/models` of a URL."""
    ready_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] | None = None
    """How long it may take to become ready; 300 for a command, 10 for a URL."""
    memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 512 * MIB
    """What the command takes beside the weights."""
    idle_connection_s: Annotated[float, msgspec.Meta(gt=0)] = 4.0
    """The server keeps idle connections at least so long."""


class OpenAI:
    """The model's `command` (a template, no shell) or `url` is the server."""

    name = "openai"
    stats_path = None

    def installed(self) -> Refusal | None:
        return None

    def can_serve(self, spec: ModelSpec, index: Index | None, node: Node) -> Offer | Refusal:
        del node
        options = parse_options(spec.options, OpenAIOptions)
        if isinstance(options, Refusal):
            return options
        if bool(spec.command) == bool(spec.url):
            return Refusal(reason="the model must name either a command or a url")
        if spec.url:
            address = _server_address(spec.url)
            if isinstance(address, Refusal):
                return address
            return Offer(memory_bytes=0, slots=options.slots)
        problem = _template_problem(spec.command, has_checkpoint=index is not None)
        return problem or Offer(memory_bytes=options.memory_bytes, slots=options.slots)

    def launch(self, launch: Launch) -> LaunchPlan:
        options = parse_options(launch.spec.options, OpenAIOptions)
        if isinstance(options, Refusal):
            raise AssertionError("launch without can_serve")
        if launch.spec.url:
            address = _server_address(launch.spec.url)
            if isinstance(address, Refusal):
                raise AssertionError("launch without can_serve")
            command: tuple[str, ...] = ()
        else:
            values = _values(launch)
            command = tuple(_fill(part, values) for part in launch.spec.command)
            address = (
                Address(f"http://127.0.0.1:{values['port']}")
                if "port" in values
                else Address(f"unix:{values['socket']}")
            )
        return LaunchPlan(
            command=command,
            address=address,
            ready_path=options.ready_path or ("/health" if command else "/v1/models"),
            ready_timeout_s=options.ready_timeout_s or (300.0 if command else 10.0),
            idle_connection_s=options.idle_connection_s,
        )

    def dialect(self, spec: ModelSpec) -> Dialect:
        """`backends.dialect.Speaks`."""
        return ForeignDialect(spec.model)

    def parse_stats(self, body: bytes) -> BackendStats:
        del body
        return BackendStats()


def _server_address(url: str) -> Address | Refusal:
    """`http://host[:port][/v1]` → its address."""
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:
        return Refusal(reason=f"url: {error}")
    plain = parts.username is None and not parts.query and not parts.fragment
    if parts.scheme != "http" or not parts.hostname or not plain:
        return Refusal(reason="url: write http://host:port, or http://host:port/v1")
    if parts.path.rstrip("/") not in {"", "/v1"}:
        return Refusal(reason=f"url: the API must be at /v1, not below {parts.path!r}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Address(f"http://{host}:{port}")


def _names(template: tuple[str, ...]) -> list[str | None]:
    """The variables of a command in order; None for a `$` that is neither `${name}` nor `$$`."""
    found = (match for part in template for match in _VARIABLE.finditer(part))
    return [match[1] for match in found if match[0] != "$$"]


def _template_problem(template: tuple[str, ...], *, has_checkpoint: bool) -> Refusal | None:
    names = _names(template)
    if None in names:
        return Refusal(reason="command: a '$' must be ${name}, or $$ for the character itself")
    unknown = sorted({str(name) for name in names} - VARIABLES.keys())
    if unknown:
        return Refusal(
            reason=f"command: unknown ${{{unknown[0]}}}; there are "
            + ", ".join(f"${{{name}}}" for name in VARIABLES)
        )
    if ("socket" in names) == ("port" in names):
        return Refusal(reason="command: it must take either ${socket} or ${port} to listen on")
    if not has_checkpoint and {"model_path", "index_path"} & set(names):
        return Refusal(reason="command: ${model_path} needs a checkpoint: give the model a source")
    return None


def _values(launch: Launch) -> dict[str, str]:
    values = {
        "model": launch.spec.model,
        "slots": str(launch.slots),
        "cpus": str(launch.node.cpus),
    }
    if "port" in _names(launch.spec.command):
        values["port"] = str(_free_port())
    else:
        values["socket"] = str(launch.run_dir / "backend.sock")
    if launch.model_path is not None and launch.index_path is not None:
        values["model_path"] = str(launch.model_path)
        values["index_path"] = str(launch.index_path)
    return values


def _fill(part: str, values: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: "$" if match[0] == "$$" else values[match[1]], part)


def _free_port() -> int:
    """A port that was free a moment ago: a foreign server cannot be handed a bound socket, so
    somebody may take it in between, and the start then fails and is tried again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
