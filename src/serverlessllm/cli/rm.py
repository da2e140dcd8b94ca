"""`sllm rm`: forget a model."""

from __future__ import annotations

from typing import Annotated

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure


def rm(
    model: options.Model,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: options.Url = None,
    json: options.Json = False,
) -> None:
    """Forget a model and delete its checkpoint."""
    import sys

    from serverlessllm.cli.client import connect, model_path
    from serverlessllm.cli.output import print_json
    from serverlessllm.core.units import format_size
    from serverlessllm.orchestrator.rest.wire import Deleted

    if not yes:
        if not sys.stdin.isatty():
            raise Failure(f"rm {model}: nobody is here to confirm", "add --yes", exit_status=2)
        typer.confirm(f"Delete {model} and its checkpoint?", abort=True)
    answer = connect(url).delete(model_path("/api/models", model), Deleted)
    if json:
        print_json(answer)
    else:
        print(f"{answer.model}: deleted, {format_size(answer.bytes_freed)} freed in the store")
