"""What verbs print: tables for people, JSON for scripts, progress on standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from rich.console import RenderableType

_PIPE_COLUMNS = 10_000


def print_json(value: object) -> None:
    """One value, indented."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_line(value: object) -> None:
    """One value on one line, at once: a stream that another program reads."""
    print(msgspec.json.encode(value).decode(), flush=True)


def print_if_read(line: str) -> None:
    """A line that nothing depends on, at once: where nobody can read it (a terminal that closes),
    it goes nowhere, and so does what is printed later."""
    try:
        print(line, flush=True)
    except OSError:
        # What could not be written waits in the buffer, and would fail once more at the exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[RenderableType]]) -> None:
    """A plain table; columns whose name starts with `#` are right-aligned numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(
            column.removeprefix("#").upper(),
            justify="right" if column.startswith("#") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    # Piped into another program, a row stays one line however long it is.
    console = Console(width=_PIPE_COLUMNS, highlight=False)
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


class Bar(Protocol):
    """A progress bar's one verb."""

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show `done` of `total` bytes of `stage`; a `total` of None is not known yet."""
        ...


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """A bar with bytes, rate and time left; without a terminal, a line per stage."""
    if not sys.stderr.isatty():
        yield _LinePerStage(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(title, total=None)

        def update(stage: str, done: int, total: int | None) -> None:
            progress.update(task, description=f"{title}: {stage}", completed=done, total=total)

        yield update


class _LinePerStage:
    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int | None) -> None:  # noqa: ARG002 - Bar
        if stage != self._stage:
            self._stage = stage
            print(f"{self._title}: {stage}", file=sys.stderr, flush=True)
