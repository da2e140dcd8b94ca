"""Its imports start a thread."""

from __future__ import annotations

import signal
import threading


def preload() -> None:
    """Leave one behind."""
    threading.Thread(target=signal.pause, daemon=True).start()
