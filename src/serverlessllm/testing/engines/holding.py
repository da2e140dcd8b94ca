"""Its imports leave a file open."""

from __future__ import annotations

import os


def preload() -> None:
    """Leave one behind."""
    os.open(os.devnull, os.O_RDONLY)
