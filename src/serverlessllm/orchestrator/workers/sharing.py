"""What keys spend, told to the other processes of a front door: each admits by its own count."""

from __future__ import annotations

from collections.abc import Callable

from serverlessllm.core.clock import Clock
from serverlessllm.orchestrator.rest.quota import Quotas
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.orchestrator.workers.messages import KeysSpent


async def share_spent(
    quotas: Quotas, tell: Callable[[KeysSpent], None], clock: Clock, interval_s: float
) -> None:
    """Tell what was spent here, each interval in which something was; ends by cancellation only."""
    while True:
        await clock.sleep(interval_s)
        spent = quotas.spent_since()
        if spent:
            tell(KeysSpent(spent=spent))


def note_spent(quotas: Quotas, view: ClusterView, message: KeysSpent) -> None:
    """Count what was spent elsewhere, also by a key that has not been met here yet."""
    for key in view.api_keys.values():
        if key.id in message.spent:
            quotas.of(key)
    quotas.note_others(message.spent)
