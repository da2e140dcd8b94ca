"""Its imports fail."""

from __future__ import annotations


def preload() -> None:
    """Raise, as an engine that is half installed does."""
    raise ImportError("no module named torch")
