"""`sllm unload`: stop a model's instances."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.cli.client import Client
    from serverlessllm.orchestrator.rest.wire import Unloaded

_TIERS = ("dram", "nvme", "store")


def unload(
    model: options.Model,
    to: Annotated[
        str, typer.Option(help="The nearest tier that keeps the bytes: dram, nvme or store.")
    ] = "dram",
    force: Annotated[bool, typer.Option("--force", help="Do not wait for requests.")] = False,
    url: options.Url = None,
    json: options.Json = False,
) -> None:
    """Stop a model's instances; DRAM keeps its bytes."""
    from serverlessllm.cli.client import connect
    from serverlessllm.cli.output import print_json

    if to not in _TIERS:
        raise Failure(f"--to {to}: write one of {', '.join(_TIERS)}", exit_status=2)
    answer = unload_model(connect(url), model, to, force=force)
    if json:
        print_json(answer)
    else:
        where = ", ".join(answer.agents) or "no agent: nothing was loaded"
        print(f"{answer.model}: unloaded to {to} on {where}")


def unload_model(client: Client, model: str, to: str, *, force: bool = False) -> Unloaded:
    """Stop the instances; `to` names the nearest tier that keeps the bytes."""
    from serverlessllm.core.cluster import CacheLevel
    from serverlessllm.orchestrator.rest.wire import Unloaded, UnloadModel

    body = UnloadModel(model=model, cache_level=CacheLevel[to.upper()], force=force)
    return client.post("/api/unload", body, Unloaded)
