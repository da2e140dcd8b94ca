"""Runs the Python source that it is given, as `python -c` does."""

from __future__ import annotations


def preload() -> None:
    """Nothing to import."""


def main(argument: str) -> None:
    """Run it."""
    exec(compile(argument, "<script>", "exec"), {"__name__": "__main__"})  # noqa: S102 - the test's own
