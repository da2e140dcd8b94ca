"""`sllm config`: the settings in force, and an example of all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.config.load import Loaded

app = typer.Typer(
    help="Settings: check them, or print an example of all.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("check")
def check(
    config: options.Config = None,
    data_dir: options.DataDir = None,
    overrides: options.Set = None,
    json: options.Json = False,
) -> None:
    """Check the configuration; print each setting in force and where it comes from."""
    from serverlessllm.cli.output import print_json, print_table

    loaded = options.settings(config, data_dir, overrides)
    _check(loaded)

    from serverlessllm.config.load import effective

    rows = effective(loaded)
    if json:
        print_json(rows)
        return
    print(f"file: {loaded.path or 'none found; defaults, environment and flags only'}")
    print(f"data: {loaded.paths.data_dir}\nsockets: {loaded.paths.runtime_dir}\n")
    print_table(("setting", "value", "set by"), ((row.key, row.value, row.origin) for row in rows))


def _check(loaded: Loaded) -> None:
    """What a start would refuse is refused here."""
    from serverlessllm import bootstrap
    from serverlessllm.core.errors import SLLMError

    try:
        bootstrap.check(loaded)
    except (ValueError, SLLMError) as error:
        raise Failure(
            str(error), "`sllm config example` explains every setting", exit_status=2
        ) from error


@app.command("example")
def example() -> None:
    """Print a configuration file with every setting, explained, at its default."""
    from serverlessllm.config.example import render

    print(render(), end="")
