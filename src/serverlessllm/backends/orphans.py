"""What a killed agent left running: found by a record on disk, ended without mistake.

`PR_SET_PDEATHSIG` ends a backend with its agent; this is for what it does not reach (the
children of a backend) and for the moment before it is set. Each backend leads a session of its
own, and the kernel gives a session's number to nobody else while a member lives: so every
process of the recorded session is the backend's, unless its leader started at another time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec

from serverlessllm.backends.procfs import boot_id, read_stat, session_members

RECORD = "process.json"
_LOOKS_MAX = 100


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Enough to know a process again."""

    pid: int
    """Of the leader: also the number of its session and of its group."""
    started_ticks: int
    """Since boot, as in `/proc/<pid>/stat`."""
    boot_id: str


def record_process(run_dir: Path, pid: int) -> ProcessRecord:
    """Write down in its run directory who `pid` is."""
    stat = read_stat(pid)
    record = ProcessRecord(
        pid=pid, started_ticks=stat.started_ticks if stat else 0, boot_id=boot_id()
    )
    (run_dir / RECORD).write_bytes(msgspec.json.encode(record))
    return record


def kill_orphans(agent_run_dir: Path) -> tuple[int, ...]:
    """End every recorded process and remove the run directories; the pids that were killed.

    Only for the one agent that owns `agent_run_dir`, before it starts anything.
    """
    killed: list[int] = []
    for run_dir in sorted(path for path in agent_run_dir.iterdir() if path.is_dir()):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            record = msgspec.json.decode((run_dir / RECORD).read_bytes(), type=ProcessRecord)
            killed += kill_session(record)
        shutil.rmtree(run_dir, ignore_errors=True)
    return tuple(killed)


def kill_session(record: ProcessRecord) -> tuple[int, ...]:
    """End what is left of a recorded process and its session; the pids that were killed."""
    return tuple(_kill_session(record))


def _kill_session(record: ProcessRecord) -> Iterator[int]:
    leader = read_stat(record.pid)
    if record.boot_id != boot_id():
        return
    if leader is not None and leader.started_ticks != record.started_ticks:
        return
    killed: set[int] = set()
    # A member may fork while the others are looked at: look again until nobody is new.
    for _ in range(_LOOKS_MAX):
        found = {member.pid for member in session_members(record.pid)} - killed
        if not found:
            return
        killed |= found
        # The leader first, so that it cannot answer the death of its children.
        for pid in sorted(found, key=lambda pid: pid != record.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                yield pid
