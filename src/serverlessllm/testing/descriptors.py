"""What this process has open, for tests that nothing stays open."""

from __future__ import annotations

import gc
from pathlib import Path


def open_descriptors() -> frozenset[str]:
    """Each as its number and what it is; a socket's name is never another's.

    Compare with `<=`, not by counts: a process that runs many tests may close, meanwhile, what an
    earlier one left to the collector.
    """
    gc.collect()
    found: set[str] = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{path.name} {path.readlink()}")
        except FileNotFoundError:  # the one that this listing was read by
            continue
    return frozenset(found)
