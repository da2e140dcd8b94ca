"""`sllm ps`: what lies and runs where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serverlessllm.cli import options

if TYPE_CHECKING:
    from serverlessllm.core.cluster import ModelOnAgent, TierUsage


def ps(url: options.Url = None, json: options.Json = False) -> None:
    """List what lies and runs where, agent by agent."""
    from serverlessllm.cli.client import connect
    from serverlessllm.cli.ls import tier_name
    from serverlessllm.cli.output import print_json, print_table
    from serverlessllm.orchestrator.rest.wire import AgentList

    agents = connect(url).get("/api/agents", AgentList).agents
    if json:
        print_json(agents)
        return
    print_table(
        ("model", "agent", "tier", "state", "#queue", "expires"),
        (
            (
                model.model,
                agent.agent,
                tier_name(model),
                model.state.value if model.state else "-",
                str(model.queue_len),
                _expires(model),
            )
            for agent in agents
            for model in sorted(agent.record.models, key=lambda m: m.model)
        ),
    )
    print()
    print_table(
        ("agent", "state", "dram", "nvme", "backends", "address"),
        (
            (
                agent.agent,
                "suspect" if agent.suspect else "up" if agent.record.accepting else "draining",
                _usage(agent.record.dram),
                _usage(agent.record.nvme),
                ", ".join(agent.record.backends) or "none: sllm doctor",
                agent.record.address,
            )
            for agent in agents
        ),
    )


def _expires(model: ModelOnAgent) -> str:
    from serverlessllm.core.units import format_duration

    if model.expires_in_s is not None:
        return f"in {format_duration(model.expires_in_s)}"
    return "never" if model.instances else "-"


def _usage(usage: TierUsage) -> str:
    from serverlessllm.core.units import format_size

    return f"{format_size(usage.used_bytes)} of {format_size(usage.budget_bytes)}"
