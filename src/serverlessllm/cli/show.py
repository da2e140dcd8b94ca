"""`sllm show`: everything about one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serverlessllm.cli import options

if TYPE_CHECKING:
    from serverlessllm.core.cluster import JobRecord


def show(model: options.Model, url: options.Url = None, json: options.Json = False) -> None:
    """Show everything about one model."""
    from serverlessllm.cli.client import connect, model_path
    from serverlessllm.cli.ls import tier_name
    from serverlessllm.cli.output import print_json, print_table
    from serverlessllm.cli.waterfall import hop_rows
    from serverlessllm.core.units import format_duration, format_size
    from serverlessllm.orchestrator.rest.wire import ModelView

    view = connect(url).get(model_path("/api/models", model), ModelView)
    if json:
        print_json(view)
        return
    spec, checkpoint = view.spec, view.checkpoint
    kept = (
        "the agent's default" if spec.keep_alive_s is None else format_duration(spec.keep_alive_s)
    )
    facts = {
        "model": view.model,
        "aliases": ", ".join(spec.aliases),
        "source": spec.source or spec.url or "",
        "backend": spec.backend or "auto",
        "keep alive": kept,
        "replicas": f"{spec.min_replicas} to {spec.max_replicas}",
        "pinned": "yes" if spec.pinned else "",
        "command": " ".join(spec.command),
        "options": ", ".join(f"{name}={value}" for name, value in spec.options.items()),
        "checkpoint": checkpoint.id if checkpoint else "not in the store" if spec.source else "",
        "adapter of": checkpoint.base or "" if checkpoint else "",
        "size": format_size(checkpoint.size_bytes) if checkpoint else "",
        "stored at": checkpoint.prefix if checkpoint else "",
        "ingest": _ingest(view.job) if view.job else "",
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value:
            print(f"{name:<{width}}  {value}")
    if view.placements:
        print()
        print_table(
            ("agent", "tier", "state", "#queue", "#instances"),
            (
                (
                    place.agent + (" (suspect)" if place.suspect else ""),
                    tier_name(place.on_agent),
                    place.on_agent.state.value if place.on_agent.state else "-",
                    str(place.on_agent.queue_len),
                    str(place.on_agent.instances),
                )
                for place in view.placements
            ),
        )
    if view.last_load is not None:
        last = view.last_load
        print(
            f"\nlast load: {format_duration(last.total_s)} on {last.agent} "
            f"(expected {format_duration(last.predicted_s)})"
        )
        if last.hops:
            print_table(("hop", "#ms", "#bytes", "#rate", "#of limit"), hop_rows(last.hops))


def _ingest(job: JobRecord) -> str:
    return job.stage.value if job.error is None else f"{job.stage.value}: {job.error.message}"
