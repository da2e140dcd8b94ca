"""One template process: it holds an engine's imports, so that an instance's start is a fork.

`inside/template.py` is what runs there.

Over the sockets, all of which keep messages apart: the template sends its pid once it is ready; a
request is JSON and descriptors (the instance's leash, its output, and those it inherits); on its
leash the instance sends its pid, waits for a byte of leave, and ends if the leash does. The keeper
sends `PID STATUS` at each end, and waits for the leader it tells of once a byte says that we know.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import msgspec

from serverlessllm.backends.child import Child, Setting, execute
from serverlessllm.backends.inside.template import (
    DESCRIPTORS_MAX,
    ENDS_FD,
    MESSAGE_BYTES_MAX,
    REQUESTS_FD,
)
from serverlessllm.backends.logs import OutputLog
from serverlessllm.backends.orphans import ProcessRecord, kill_session, record_process
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.waits import first, readable
from serverlessllm.core.clock import Clock

_SCRIPT = "serverlessllm.backends.inside.template"
_ENVIRONMENT = {
    # numpy's OpenBLAS starts its threads when it is imported: they would not survive the fork.
    "OPENBLAS_NUM_THREADS": "1",
}
_ACK = b"\n"


class Template:
    """One template process with its keeper, from its start until its last instance has ended."""

    def __init__(
        self,
        module: str,
        *,
        run_dir: Path,
        log_path: Path,
        environment: dict[str, str],
        settings: BackendSettings,
        clock: Clock,
    ) -> None:
        """Start it. `run_dir` exists and is removed at the end.

        Raises:
            OSError: it cannot be started.
        """
        self._settings = settings
        self._clock = clock
        self._run_dir = run_dir
        self._followed: dict[int, tuple[asyncio.Future[int], ProcessRecord]] = {}
        self._pid = 0
        self._silent = asyncio.Event()
        self.ended = asyncio.Event()
        """It forks no more; what it forked may live on."""
        self._log = OutputLog(
            log_path, bytes_max=settings.log_bytes_max, tail_lines=settings.log_tail_lines
        )
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as lent:
            ours.callback(self._log.close)
            self._requests, requests_end = _pair(ours, lent)
            self._ends, ends_end = _pair(ours, lent)
            output, output_end = os.pipe()
            lent.callback(os.close, output_end)
            self._log.drain(output)
            descriptors = {REQUESTS_FD: requests_end.fileno(), ENDS_FD: ends_end.fileno()}
            self._keeper = execute(
                (sys.executable, "-I", "-m", _SCRIPT, module),
                Setting(
                    environment=environment | _ENVIRONMENT,
                    run_dir=run_dir,
                    output=output_end,
                    descriptors=descriptors,
                ),
            )
            ours.pop_all()
        asyncio.get_running_loop().add_reader(self._ends.fileno(), self._hear_of_ends)
        self.gone = asyncio.ensure_future(self._clean_up())
        """Done once nothing of it is left, nor of what it forked."""

    @property
    def pid(self) -> int:
        """Of the process that forks; 0 until it is ready."""
        return self._pid

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines it printed."""
        return self._log.tail()

    async def wait_ready(self) -> bool:
        """Whether its imports came to a good end, in time."""
        limit = self._clock.sleep(self._settings.template_start_timeout_s)
        await first(readable(self._requests.fileno()), self.ended.wait(), limit)
        with contextlib.suppress(OSError):
            self._pid = int(self._requests.recv(32) or 0)
        return self._pid > 0 and not self.ended.is_set()

    async def fork(self, argument: str, setting: Setting) -> Child | None:
        """None when it cannot, or does not in time; then it is ended."""
        message = _request(argument, setting)
        descriptors = [setting.output, *setting.descriptors.values()]
        if len(message) > MESSAGE_BYTES_MAX or len(descriptors) >= DESCRIPTORS_MAX:
            return None
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as lent:
            leash, leash_end = _pair(ours, lent)
            try:
                socket.send_fds(self._requests, [message], [leash_end.fileno(), *descriptors])
            except OSError:  # it has ended; or so many wait that executing is faster
                return None
            lent.close()
            limit = self._clock.sleep(self._settings.template_fork_timeout_s)
            await first(readable(leash.fileno()), limit)
            try:
                return self._give_leave(leash, setting)
            except BlockingIOError:
                self.end()
            except OSError:  # it has ended since; or nothing can be recorded
                pass
            return None

    def end(self) -> None:
        """Fork no more. What it forked lives on. Idempotent."""
        self._requests.close()
        if not self._pid:
            self._keeper.signal(signal.SIGKILL)
        elif not self.ended.is_set():  # until we have heard, its number is its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def kill(self) -> None:
        """End it, and all that it forked."""
        self._requests.close()
        self._keeper.signal(signal.SIGKILL)

    def _give_leave(self, leash: socket.socket, setting: Setting) -> Child | None:
        pid = int(leash.recv(32) or 0)
        if not pid:
            return None
        record = record_process(setting.run_dir, pid)
        leash.send(_ACK)
        # It was alive to be sent this, so its end is still to be heard of.
        exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._followed[pid] = exited, record
        return Child(pid, exited)

    def _hear_of_ends(self) -> None:
        """The keeper tells one end at a time, and none without having been answered."""
        try:
            told = self._ends.recv(64)
            if told:
                self._ends.send(_ACK)
        except BlockingIOError:
            return
        except OSError:
            told = b""
        if not told:
            self._keeper_ended()
            return
        pid, status = map(int, told.split())
        if pid in self._followed:
            exited, _ = self._followed.pop(pid)
            exited.set_result(status)
        elif pid == self._pid or not self._pid:
            self.ended.set()

    def _keeper_ended(self) -> None:
        """After its last child; or before, and they were killed with it, but what they started
        was not."""
        asyncio.get_running_loop().remove_reader(self._ends.fileno())
        self._ends.close()
        for exited, record in self._followed.values():
            kill_session(record)
            exited.set_result(-signal.SIGKILL)
        self._followed.clear()
        self.ended.set()
        self._silent.set()

    async def _clean_up(self) -> None:
        await self._keeper.exited
        await self._silent.wait()
        self._requests.close()
        self._log.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)


def _request(argument: str, setting: Setting) -> bytes:
    asked = {
        "argument": argument,
        "run_dir": str(setting.run_dir),
        "environment": setting.environment,
        "names": tuple(setting.descriptors),
    }
    return msgspec.json.encode(asked)


def _pair(
    ours: contextlib.ExitStack, lent: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    """Two ends of a socket that keeps messages apart: ours does not block, the other does."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine.setblocking(False)
    return ours.enter_context(mine), lent.enter_context(theirs)
