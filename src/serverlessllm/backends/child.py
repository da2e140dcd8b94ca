"""A process that we own: executed, or forked by a template; its end is an event.

It leads its own session and group, dies with the agent (`PR_SET_PDEATHSIG`), and gets an
environment without credentials.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec

from serverlessllm.backends.orphans import record_process

_GUARD = ("setpriv", "--pdeathsig", "KILL", "--no-new-privs", "--")
_INHERITED = frozenset({"PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"})
_INHERITED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "ROCR_", "HIP_", "ONEAPI_")


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a backend may know of our environment: a list of names, so no credential by default."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return {"PATH": os.defpath} | kept


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What a process finds when it begins, whichever way it is started."""

    environment: dict[str, str]
    """All of it, but for the variables of `descriptors`."""
    run_dir: Path
    """Where it works, and where it is recorded."""
    output: int
    """Descriptor that its stdout and stderr go to."""
    descriptors: dict[str, int] = {}
    """Inherited beside that: variable that will name the descriptor → the descriptor here."""


class Child:
    """A process, the leader of its session and group."""

    def __init__(self, pid: int, exited: asyncio.Future[int]) -> None:
        self.pid = pid
        self.exited = exited
        """Its exit status (negative: the signal that ended it). Until then `pid` is nobody
        else's number."""

    def signal(self, number: signal.Signals) -> None:
        """To the whole group, unless its leader has ended: then the group was killed."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def execute(command: tuple[str, ...], setting: Setting) -> Child:
    """Start a command, in the loop's own thread: the signal at the parent's death is for the
    death of the thread that started the child.

    Raises:
        OSError: it cannot be started or not be watched; nothing of it runs.
    """
    environment = setting.environment | {
        name: str(descriptor) for name, descriptor in setting.descriptors.items()
    }
    if shutil.which(command[0], path=environment["PATH"]) is None:
        # The guard would find out too, but only its log would tell.
        raise FileNotFoundError(errno.ENOENT, "no such program on the agent's PATH")
    guard = _GUARD if shutil.which(_GUARD[0]) else ()
    popen = subprocess.Popen(
        [*guard, *command],
        stdin=subprocess.DEVNULL,
        stdout=setting.output,
        stderr=subprocess.STDOUT,
        cwd=setting.run_dir,
        env=environment,
        start_new_session=True,
        pass_fds=tuple(setting.descriptors.values()),
    )
    try:
        record_process(setting.run_dir, popen.pid)
        pidfd = os.pidfd_open(popen.pid)
    except OSError:  # a full disk, too many open files: it must not run unwatched
        os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()
        raise
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[int] = loop.create_future()

    def reap() -> None:
        """The leader has ended. Until it is waited for, its number is nobody else's, so this is
        the moment to end the rest of its group."""
        loop.remove_reader(pidfd)
        os.close(pidfd)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(popen.pid, signal.SIGKILL)
        exited.set_result(popen.wait())

    loop.add_reader(pidfd, reap)
    return Child(popen.pid, exited)
