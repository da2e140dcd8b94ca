"""`sllm`: the table of verbs, and the one place where an error becomes an exit status."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from serverlessllm import __version__
from serverlessllm.cli import (
    agent,
    bench,
    config_check,
    convert,
    demo,
    doctor,
    explain,
    inspect,
    key,
    load,
    ls,
    options,
    orchestrator,
    ps,
    pull,
    rm,
    run,
    serve,
    show,
    unload,
    verify,
)
from serverlessllm.cli.failure import Failure

app = typer.Typer(
    name="sllm",
    help="Many models, few machines: the first request wakes a model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Typer's own help: rich's boxes cost 0.2 s of imports.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    ca: Annotated[
        Path | None,
        typer.Option(
            "--ca",
            help="Certificates to trust for an https server (PEM). "
            "[default: SLLM_CA, else the system's]",
            show_default=False,
        ),
    ] = None,
) -> None:
    options.CA_FILE.set(ca)


app.command("serve")(serve.serve)
app.command("orchestrator")(orchestrator.orchestrator)
app.command("agent")(agent.agent)
app.command("demo")(demo.demo)

app.command("run")(run.run)
app.command("pull")(pull.pull)
app.command("ls")(ls.ls)
app.command("ps")(ps.ps)
app.command("show")(show.show)
app.command("load")(load.load)
app.command("unload")(unload.unload)
app.command("rm")(rm.rm)

app.command("convert")(convert.convert)
app.command("inspect")(inspect.inspect)
app.command("verify")(verify.verify)

app.command("explain")(explain.explain)
app.command("doctor")(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.add_typer(config_check.app, name="config")
app.add_typer(key.app, name="key")


def main() -> None:
    """Run the verb; an expected failure is one line and its cure, never a traceback."""
    try:
        app(prog_name="sllm")
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        if failure.cure:
            print(f"  → {failure.cure}", file=sys.stderr)
        sys.exit(failure.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left (`sllm ls | head`): say nothing more, not even at exit.
        sys.stdout = None
        sys.exit(141)


if __name__ == "__main__":
    main()
