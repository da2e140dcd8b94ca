"""`sllm explain`: the scheduler's table for one model."""

from __future__ import annotations

from serverlessllm.cli import options


def explain(model: options.Model, url: options.Url = None, json: options.Json = False) -> None:
    """Show where a request would go now, and why."""
    from serverlessllm.cli.client import connect, model_path
    from serverlessllm.cli.output import print_json, print_table
    from serverlessllm.orchestrator.rest.wire import Explained

    answer = connect(url).get(model_path("/api/explain", model), Explained)
    if json:
        print_json(answer)
        return
    print(f"{answer.model}: {answer.chosen or 'no agent can take it now'}\n")
    print_table(
        (
            *("", "agent", "tier", "#queue"),
            *("#start s", "#kv s", "#queue s", "#move s", "#score s", "why not"),
        ),
        (
            (
                "→" if row.chosen else "",
                row.agent,
                row.cache_level.tier,
                str(row.queue_len),
                f"{row.cache_term_s:.3f}",
                f"{row.kv_term_s or 0.0:.3f}",
                f"{row.queue_term_s:.3f}",
                f"{row.move_term_s:.3f}",
                f"{row.score_s:.3f}",
                row.reason,
            )
            for row in answer.rows
        ),
    )
