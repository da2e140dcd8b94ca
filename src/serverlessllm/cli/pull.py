"""`sllm pull`: bring a model's checkpoint into the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.cli.client import Client


def pull(
    model: Annotated[str, typer.Argument(help="org/name[@revision] of the hub, or any name.")],
    source: Annotated[
        str | None,
        typer.Option(help="hf://org/name[@rev], file:///folder-or.gguf, s3://bucket/folder."),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="The engine that is to serve it.")] = None,
    url: options.Url = None,
    json: options.Json = False,
) -> None:
    """Fetch a model, convert it and publish it in the store."""
    from serverlessllm.cli.client import connect, model_path
    from serverlessllm.orchestrator.rest.wire import ModelView

    if source is not None and "://" not in source:
        from pathlib import Path

        path = Path(source).resolve()
        hint = f"did you mean {path.as_uri()}?" if path.exists() else "file:///… for a path"
        raise Failure(f"--source {source}: not a URL", hint, exit_status=2)
    client = connect(url)
    if source is None and "/" not in model:
        # No name of the hub: only what is registered has a source of its own.
        client.get(model_path("/api/models", model), ModelView)
    pull_model(client, model, source, backend, json=json)


def pull_model(
    client: Client, model: str, source: str | None, backend: str | None, *, json: bool = False
) -> None:
    """Pull with a progress bar, or with a line of JSON per report."""
    from serverlessllm.cli.output import print_line, progress_bar
    from serverlessllm.core.cluster import JobRecord, JobStage
    from serverlessllm.orchestrator.rest.wire import PullModel

    body = PullModel(model=model, source=source, backend=backend)
    last: JobRecord | None = None
    with progress_bar(model) as bar:
        for last in client.stream("/api/pull", body, JobRecord):
            if json:
                print_line(last)
            else:
                bar(last.stage.value, last.bytes_done, last.bytes_total)
    if last is not None and last.error is not None:
        raise Failure(last.error.message, "`sllm doctor` checks the store")
    if last is None or last.stage is not JobStage.DONE:
        raise Failure(f"{model}: the server ended the pull without an answer", "see its log")
    if not json:
        print(f"{model}: in the store")
