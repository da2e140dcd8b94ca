"""What `/proc` says of a process and of the session it belongs to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ProcessStat(msgspec.Struct, frozen=True):
    """The fields of `/proc/<pid>/stat` that are used here."""

    pid: int
    state: str
    session: int
    cpu_s: float
    """User and system time of all its threads."""
    started_ticks: int
    """Since boot."""


def read_stat(pid: int) -> ProcessStat | None:
    """None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND
    return ProcessStat(pid, fields[0], int(fields[3]), cpu_s, int(fields[19]))


def session_members(session: int) -> Iterator[ProcessStat]:
    """The living processes of a session."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            stat = read_stat(int(entry.name))
            if stat is not None and stat.session == session and stat.state != "Z":
                yield stat


def session_cpu_s(session: int) -> float:
    """CPU time of a session's living processes together."""
    return sum(stat.cpu_s for stat in session_members(session))


def boot_id() -> str:
    """Another one after each start of the machine."""
    return _BOOT_ID.read_text().strip()
