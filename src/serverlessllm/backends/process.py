"""One backend process: started, watched, drained and stopped, with all that it started.

It is executed, or forked by a template process that has its imports behind it; who supervises it
sees no difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

from serverlessllm.backends.base import ARRIVALS_FD, READY_FD, LaunchPlan
from serverlessllm.backends.child import Child, Setting, clean_environment, execute
from serverlessllm.backends.logs import OutputLog
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.templates import Templates
from serverlessllm.backends.waits import first
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import LoadFailed
from serverlessllm.edge.upstream import UpstreamError, Upstreams


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
        descriptors: Mapping[str, int] | None = None,
        templates: Templates | None = None,
    ) -> None:
        """Start it: at once, or, when the plan names a template and there are `templates`, as
        soon as that can fork. `run_dir` exists, is private, and is removed by `stop`.

        `descriptors` are inherited, each under the number that the variable of its name will
        tell; the caller keeps its own copies and closes them when it likes.

        Raises:
            LoadFailed: the command cannot be started.
        """
        self._plan = plan
        self._settings = settings
        self._clock = clock
        self._run_dir = run_dir
        self._templates = templates
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """Its exit status (negative: the signal that ended it), at once when it has ended."""
        self._told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._log = OutputLog(
            log_path, bytes_max=settings.log_bytes_max, tail_lines=settings.log_tail_lines
        )
        self._ready_pipe = -1
        self._child: Child | None = None
        self._forking: asyncio.Task[None] | None = None
        self._forked = False
        with contextlib.ExitStack() as lent:
            try:
                setting = self._lend(
                    clean_environment(environ) | plan.environment, descriptors or {}, lent
                )
                if templates is None or plan.template is None:
                    self._own(execute(plan.command, setting))
                    return
            except OSError as error:
                self._close()
                raise _cannot_start(plan, error) from error
            self._forking = asyncio.create_task(
                self._fork(templates, plan.template, setting, lent.pop_all()), name="fork"
            )

    @property
    def pid(self) -> int:
        """Of the leader; also its group and its session. From `wait_ready` on."""
        if self._child is None:
            raise AssertionError("asked for the pid before it was started")
        return self._child.pid

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines it printed."""
        return self._log.tail()

    async def wait_ready(self, upstreams: Upstreams) -> None:
        """Return when it answers 200 on its ready path.

        Raises:
            LoadFailed: it cannot be started, it ended first, or its time is over.
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
                self._distrust_template()
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
            if self._forking is not None:
                self._forking.cancel()
                await asyncio.gather(self._forking, return_exceptions=True)
            if self._child is not None:
                self._child.signal(signal.SIGTERM)
                await self.ended_within(self._settings.term_s)
        finally:
            self.kill()
            try:
                if self._child is not None:
                    await self.ended_within(self._settings.kill_s)
            finally:
                self._close()
                shutil.rmtree(self._run_dir, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL to the whole group, now."""
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    def _lend(
        self,
        environment: dict[str, str],
        descriptors: Mapping[str, int],
        lent: contextlib.ExitStack,
    ) -> Setting:
        """What the process will find; `lent` closes our copies of its descriptors."""
        output, output_end = os.pipe()
        self._log.drain(output)
        lent.callback(os.close, output_end)
        inherited = {}
        if self._plan.tells_ready:
            self._ready_pipe, inherited[READY_FD] = os.pipe()
            lent.callback(os.close, inherited[READY_FD])
            asyncio.get_running_loop().add_reader(self._ready_pipe, self._heard)
        for name, descriptor in descriptors.items():
            inherited[name] = os.dup(descriptor)
            lent.callback(os.close, inherited[name])
        return Setting(
            environment=environment,
            run_dir=self._run_dir,
            output=output_end,
            descriptors=inherited,
        )

    async def _fork(
        self, templates: Templates, module: str, setting: Setting, lent: contextlib.ExitStack
    ) -> None:
        """Become a fork of the template; executed, where there is none to be had."""
        with lent:
            child = await templates.fork(module, self._plan.command[-1], setting)
            self._forked = child is not None
            if child is not None:
                self._own(child)
                if await self._comes_up(child, setting):
                    return
                self._distrust_template()
                self._child = None
                child.signal(signal.SIGKILL)
                await child.exited
            try:
                self._own(execute(self._plan.command, setting))
            except OSError as error:
                raise _cannot_start(self._plan, error) from error

    async def _comes_up(self, child: Child, setting: Setting) -> bool:
        """False: the fork hangs, and another process may take its place (which it may not once
        somebody has read what arrived)."""
        if not self._plan.tells_ready or ARRIVALS_FD in setting.descriptors:
            return True
        limit = self._clock.sleep(self._settings.template_ready_timeout_s)
        await first(self._told, child.exited, limit)
        return self._told.done() or child.exited.done()

    def _distrust_template(self) -> None:
        if self._forked and self._templates is not None and self._plan.template is not None:
            self._templates.distrust(self._plan.template)

    def _own(self, child: Child) -> None:
        self._child = child

        def ended(status: asyncio.Future[int]) -> None:
            if self._child is child:
                self.exited.set_result(status.result())

        child.exited.add_done_callback(ended)

    async def _answers(self, upstreams: Upstreams) -> None:
        """Return when a probe is answered 200, not asking before the process has told."""
        if self._forking is not None:
            await asyncio.shield(self._forking)
        if self._plan.tells_ready:
            await self._told
        await until_answering(self._plan, upstreams, self._clock, self._settings)

    def _heard(self) -> None:
        """The ready pipe spoke; or it was closed unused, which is a reason to probe too."""
        os.read(self._ready_pipe, 16)
        if not self._told.done():
            self._told.set_result(None)
        self._close_ready_pipe()

    def _close(self) -> None:
        self._told.cancel()
        self._close_ready_pipe()
        self._log.close()

    def _close_ready_pipe(self) -> None:
        if self._ready_pipe >= 0:
            asyncio.get_running_loop().remove_reader(self._ready_pipe)
            os.close(self._ready_pipe)
            self._ready_pipe = -1


def _cannot_start(plan: LaunchPlan, error: OSError) -> LoadFailed:
    return LoadFailed(
        f"the backend's command {plan.command[0]!r} cannot be started: {error.strerror}"
    )
