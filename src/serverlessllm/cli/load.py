"""`sllm load`: wake a model before somebody asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.cli.client import Client
    from serverlessllm.core.agentapi import LoadEvent


def load(
    model: options.Model,
    keep_alive: Annotated[
        str | None, typer.Option(help="How long it stays without requests: 5m, 1h, -1 (forever).")
    ] = None,
    url: options.Url = None,
    json: options.Json = False,
) -> None:
    """Make a model ready to answer."""
    from serverlessllm.cli.client import connect

    event = load_model(connect(url), model, keep_alive, json=json)
    if not json:
        from serverlessllm.core.units import format_size

        moved = sum(hop.bytes_moved for hop in event.hops)
        seconds = sum(hop.seconds for hop in event.hops)
        print(f"{model}: ready ({format_size(moved)} moved, {seconds:.2f} s)")


def load_model(
    client: Client, model: str, keep_alive: str | None = None, *, json: bool = False
) -> LoadEvent:
    """Load with a progress bar, or with a line of JSON per report; the last event."""
    from serverlessllm.cli.client import cure
    from serverlessllm.cli.output import print_line, progress_bar
    from serverlessllm.core.agentapi import LoadEvent
    from serverlessllm.orchestrator.rest.wire import LoadModel

    event: LoadEvent | None = None
    body = LoadModel(model=model, keep_alive=keep_alive)
    with progress_bar(model) as bar:
        for event in client.stream("/api/load", body, LoadEvent):
            if json:
                print_line(event)
            else:
                bar(_stage(event), event.bytes_done, event.bytes_total)
    if event is not None and event.error is not None:
        error = event.error
        raise Failure(error.message, cure(error.code, error.message, client), code=error.code)
    if event is None or event.state != "ready":
        raise Failure(f"{model}: the server ended the load without an answer", "see its log")
    return event


def _stage(event: LoadEvent) -> str:
    """What is under way; the agent's queue and the orchestrator's are one to who waits."""
    return "queued" if event.stage == "queue" else event.stage or event.state
