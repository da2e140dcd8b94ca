"""Its imports never end."""

from __future__ import annotations

import signal


def preload() -> None:
    """Wait for what does not come."""
    signal.pause()
