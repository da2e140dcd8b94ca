"""`sllm ls`: the registered models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serverlessllm.cli import options

if TYPE_CHECKING:
    from serverlessllm.cli.client import Client
    from serverlessllm.core.cluster import ModelOnAgent
    from serverlessllm.orchestrator.rest.wire import ModelView


def ls(url: options.Url = None, json: options.Json = False) -> None:
    """List the models that clients may ask for."""
    from serverlessllm.cli.client import connect
    from serverlessllm.cli.output import print_json, print_table
    from serverlessllm.core.units import format_size

    models = list_models(connect(url))
    if json:
        print_json(models)
        return
    print_table(
        ("model", "#size", "in", "backend", "source"),
        (
            (
                view.model,
                format_size(view.checkpoint.size_bytes) if view.checkpoint else "-",
                nearest_tier(view),
                view.spec.backend or "auto",
                view.spec.source or view.spec.url or " ".join(view.spec.command) or "-",
            )
            for view in models
        ),
    )


def list_models(client: Client) -> list[ModelView]:
    """Every model, all pages."""
    from urllib.parse import quote

    from serverlessllm.orchestrator.rest.wire import ModelList

    page = client.get("/api/models", ModelList)
    models = list(page.models)
    while page.next_after is not None:
        page = client.get(f"/api/models?after={quote(page.next_after, safe='')}", ModelList)
        models += page.models
    return models


def nearest_tier(view: ModelView) -> str:
    """The best tier that holds its bytes anywhere; `-` where none has any, `failed` where the
    ingest did."""
    nearest = min(
        (p.on_agent for p in view.placements), key=lambda on: on.cache_level, default=None
    )
    if nearest is not None and tier_name(nearest) != "-":
        return nearest.cache_level.tier
    if view.checkpoint is not None:
        return "store"
    return "failed" if view.job is not None and view.job.error is not None else "-"


def tier_name(on_agent: ModelOnAgent) -> str:
    """Where it lies; `-` for a model without a checkpoint that is not running either."""
    if on_agent.checkpoint is None and not on_agent.instances:
        return "-"
    return on_agent.cache_level.tier
