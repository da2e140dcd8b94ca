"""`sllm key`: API keys, made and revoked in the metadata store itself, so also before the first
start; a running server hears of a change at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.core.apikeys import NewApiKey
    from serverlessllm.metadata.registry import Registry
    from serverlessllm.orchestrator.rest.wire import KeyView

T = TypeVar("T")

app = typer.Typer(
    help="API keys: create, list, revoke.", no_args_is_help=True, rich_markup_mode=None
)

_SCOPES = "inference (/v1), admin (/api and /metrics), metrics (/metrics)"


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what for.")],
    scopes: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help=f"What it opens: {_SCOPES}; repeatable. [default: inference]",
            show_default=False,
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A model that it may use, `*` for any letters; repeatable. [default: all]",
            show_default=False,
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="How long it is good: 30d, 12h. [default: until revoked]")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    requests_at_once: Annotated[int | None, typer.Option(min=1)] = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    overrides: options.Set = None,
    json: options.Json = False,
) -> None:
    """Make an API key and print it: it is shown this once, and stored as a hash."""
    import sys

    from serverlessllm.cli.output import print_json
    from serverlessllm.core.apikeys import NewApiKey, Scope
    from serverlessllm.orchestrator.rest.wire import created_key

    unknown = [scope for scope in scopes or () if scope not in set(Scope)]
    if unknown:
        raise Failure(f"--scope {unknown[0]}: there is no such scope", _SCOPES, exit_status=2)
    wanted = NewApiKey(
        name=name,
        scopes=tuple(Scope(scope) for scope in dict.fromkeys(scopes or ("inference",))),
        models=tuple(models or ()),
        expires_s=_expires_s(expires),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        requests_at_once=requests_at_once,
    )

    async def make(registry: Registry) -> tuple[KeyView, str]:
        made = created_key(*await registry.create_api_key(wanted))
        return made, made.key

    view, text = _on_registry(make, data_dir, config, overrides)
    if json:
        print_json(view)
        return
    print(text)
    said = f"{view.id} ({view.name}) opens {_opens(wanted)}; keep it: it is not shown again"
    print(said, file=sys.stderr)


@app.command("list")
def list_keys(
    data_dir: options.DataDir = None,
    config: options.Config = None,
    overrides: options.Set = None,
    json: options.Json = False,
) -> None:
    """List the API keys, the revoked ones at the end."""
    from serverlessllm.cli.output import print_json, print_table
    from serverlessllm.core.clock import wall_s
    from serverlessllm.orchestrator.rest.wire import key_view

    async def read(registry: Registry) -> list[KeyView]:
        return [key_view(key) for key in await registry.list_api_keys()]

    keys = _on_registry(read, data_dir, config, overrides)
    keys.sort(key=lambda key: (key.revoked_s is not None, key.created_s, key.id))
    if json:
        print_json(keys)
        return
    now_s = wall_s()
    print_table(
        ("id", "name", "scopes", "models", "state", "#requests/min", "#tokens/min", "#at once"),
        (
            (
                key.id,
                key.name,
                " ".join(key.scopes),
                " ".join(key.models) or "all",
                _state(key, now_s),
                *(
                    "-" if limit is None else str(limit)
                    for limit in (
                        key.requests_per_minute,
                        key.tokens_per_minute,
                        key.requests_at_once,
                    )
                ),
            )
            for key in keys
        ),
    )


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="A key's id or name, as `sllm key list` shows it.")],
    data_dir: options.DataDir = None,
    config: options.Config = None,
    overrides: options.Set = None,
    json: options.Json = False,
) -> None:
    """Revoke an API key; requests that are running finish."""
    from serverlessllm.cli.output import print_json
    from serverlessllm.orchestrator.rest.wire import key_view

    async def end(registry: Registry) -> KeyView:
        return key_view(await registry.revoke_api_key(key))

    view = _on_registry(end, data_dir, config, overrides)
    if json:
        print_json(view)
    else:
        print(f"{view.id} ({view.name}): revoked")


def _on_registry(
    act: Callable[[Registry], Awaitable[T]],
    data_dir: str | None,
    config: options.Config,
    overrides: list[str] | None,
) -> T:
    """What `act` returns of the configured metadata store; its errors as failures."""
    import asyncio

    from serverlessllm.bootstrap import open_registry
    from serverlessllm.core.errors import SLLMError

    loaded = options.settings(config, data_dir, overrides)

    async def run() -> T:
        async with open_registry(loaded) as registry:
            return await act(registry)

    try:
        return asyncio.run(run())
    except SLLMError as error:
        raise Failure(error.message, exit_status=2 if error.status == 400 else 1) from error
    except (OSError, ValueError) as error:
        raise Failure(str(error), "look at --data-dir and metadata_url", exit_status=2) from error


def _expires_s(text: str | None) -> int | None:
    """The Unix time of so long from now."""
    from serverlessllm.core.clock import wall_s
    from serverlessllm.core.units import parse_duration_s

    if text is None:
        return None
    try:
        duration_s = parse_duration_s(text)
    except ValueError as error:
        raise Failure(f"--expires: {error}", exit_status=2) from error
    if duration_s < 1:
        raise Failure(
            f"--expires {text}: write how long it is good, such as 30d; "
            "without it the key is good until it is revoked",
            exit_status=2,
        )
    return wall_s() + round(duration_s)


def _opens(wanted: NewApiKey) -> str:
    return ", ".join(wanted.scopes) + (f" for {', '.join(wanted.models)}" if wanted.models else "")


def _state(key: KeyView, now_s: int) -> str:
    from serverlessllm.core.units import format_duration

    if key.revoked_s is not None:
        return "revoked"
    if key.expires_s is None:
        return "good"
    left_s = key.expires_s - now_s
    return f"good for {format_duration(left_s)}" if left_s > 0 else "expired"
