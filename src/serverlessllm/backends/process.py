"""One backend process: started, watched, drained and stopped, with all that it started.

It leads its own session and group, dies with the agent (`setpriv --pdeathsig`), and gets an
environment without credentials. Its end is an event (a pidfd), not a poll.
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

from serverlessllm.backends.base import READY_FD, LaunchPlan
from serverlessllm.backends.logs import OutputLog
from serverlessllm.backends.orphans import record_process
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.waits import first
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import LoadFailed
from serverlessllm.edge.upstream import UpstreamError, Upstreams

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


async def until_answering(
    plan: LaunchPlan, upstreams: Upstreams, clock: Clock, settings: BackendSettings
) -> None:
    """Return when the server answers 200 on its ready path. A server that cannot tell when that
    is can only be asked again and again, with growing pauses."""
    pause_s = settings.probe_s_min
    while not await _probe(plan, upstreams, settings.probe_timeout_s):
        await clock.sleep(pause_s)
        pause_s = min(2 * pause_s, settings.probe_s_max)


async def _probe(plan: LaunchPlan, upstreams: Upstreams, timeout_s: float) -> bool:
    try:
        async with upstreams.send(
            plan.address, "GET", plan.ready_path, timeout_s=timeout_s
        ) as response:
            await response.read()
            return response.status == 200
    except UpstreamError:
        return False


class BackendProcess:
    """A command under supervision. Use from one event loop only."""

    def __init__(
        self,
        plan: LaunchPlan,
        *,
        run_dir: Path,
        log_path: Path,
        environ: Mapping[str, str],
        settings: BackendSettings,
        clock: Clock,
    ) -> None:
        """Start it. `run_dir` exists, is private, and is removed by `stop`.

        Raises:
            LoadFailed: the command cannot be started.
        """
        self._plan = plan
        self._settings = settings
        self._clock = clock
        self._run_dir = run_dir
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = loop.create_future()
        """Its exit status (negative: the signal that ended it), at once when it has ended."""
        self._told: asyncio.Future[None] = loop.create_future()
        self._log = OutputLog(
            log_path, bytes_max=settings.log_bytes_max, tail_lines=settings.log_tail_lines
        )
        self._ready_pipe = -1
        try:
            self._popen = self._spawn(clean_environment(environ) | plan.environment)
        except OSError as error:
            self._close()
            raise LoadFailed(
                f"the backend's command {plan.command[0]!r} cannot be started: {error.strerror}"
            ) from error
        try:
            record_process(run_dir, self.pid)
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:  # a full disk, too many open files: it must not run unwatched
            os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait()
            self._close()
            raise LoadFailed(f"the backend cannot be watched over: {error.strerror}") from error
        loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """Of the leader; also its group and its session."""
        return self._popen.pid

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines it printed."""
        return self._log.tail()

    async def wait_ready(self, upstreams: Upstreams) -> None:
        """Return when it answers 200 on its ready path.

        Raises:
            LoadFailed: it ended first, or its time is over.
        """
        answers = asyncio.ensure_future(self._answers(upstreams))
        try:
            await first(answers, self.exited, self._clock.sleep(self._plan.ready_timeout_s))
            if self.exited.done():
                raise LoadFailed(
                    f"the backend ended with status {self.exited.result()} before it was ready; "
                    "the agent's log has its last lines"
                )
            if not answers.done():
                raise LoadFailed(
                    f"the backend was not ready within {self._plan.ready_timeout_s:g} s"
                )
            answers.result()
        finally:
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)

    async def ended_within(self, seconds: float) -> bool:
        """Whether it ends in this time."""
        await first(self.exited, self._clock.sleep(seconds))
        return self.exited.done()

    async def stop(self) -> None:
        """End the whole group, SIGTERM first, and leave nothing of it behind. Idempotent."""
        try:
            self._signal(signal.SIGTERM)
            await self.ended_within(self._settings.term_s)
        finally:
            self.kill()
            await self.ended_within(self._settings.kill_s)
            self._close()
            shutil.rmtree(self._run_dir, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL to the whole group, now."""
        self._signal(signal.SIGKILL)

    def _spawn(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        if shutil.which(self._plan.command[0], path=environment["PATH"]) is None:
            # The guard would find out too, but only its log would tell.
            raise FileNotFoundError(errno.ENOENT, "no such program on the agent's PATH")
        guard = _GUARD if shutil.which(_GUARD[0]) else ()
        output, output_end = os.pipe()
        self._log.drain(output)
        inherited = []
        try:
            if self._plan.tells_ready:
                self._ready_pipe, ready_end = os.pipe()
                inherited.append(ready_end)
                environment[READY_FD] = str(ready_end)
                asyncio.get_running_loop().add_reader(self._ready_pipe, self._heard)
            # In the loop's own thread: the signal at the parent's death is for the death of the
            # thread that started the child.
            return subprocess.Popen(
                [*guard, *self._plan.command],
                stdin=subprocess.DEVNULL,
                stdout=output_end,
                stderr=subprocess.STDOUT,
                cwd=self._run_dir,
                env=environment,
                start_new_session=True,
                pass_fds=inherited,
            )
        finally:
            for descriptor in (output_end, *inherited):
                os.close(descriptor)

    async def _answers(self, upstreams: Upstreams) -> None:
        """Return when a probe is answered 200, not asking before the process has told."""
        if self._plan.tells_ready:
            await self._told
        await until_answering(self._plan, upstreams, self._clock, self._settings)

    def _heard(self) -> None:
        """The ready pipe spoke; or it was closed unused, which is a reason to probe too."""
        os.read(self._ready_pipe, 16)
        if not self._told.done():
            self._told.set_result(None)
        self._close_ready_pipe()

    def _reap(self) -> None:
        """The leader has ended. Until it is waited for, its number is nobody else's, so this is
        the moment to end the rest of its group."""
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.exited.set_result(self._popen.wait())

    def _signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _close(self) -> None:
        self._told.cancel()
        self._close_ready_pipe()
        self._log.close()

    def _close_ready_pipe(self) -> None:
        if self._ready_pipe >= 0:
            asyncio.get_running_loop().remove_reader(self._ready_pipe)
            os.close(self._ready_pipe)
            self._ready_pipe = -1
