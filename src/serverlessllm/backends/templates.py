"""The template processes of an agent: started ahead, replaced when they fail, ended when idle.

A template is a convenience: whatever is wrong with it, `Templates.fork` gives nothing and the
instance is executed.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Mapping
from pathlib import Path

from serverlessllm.backends.child import Child, Setting, clean_environment
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.template import Template
from serverlessllm.backends.waits import first
from serverlessllm.core.clock import Clock
from serverlessllm.telemetry import log

PACKAGE = "serverlessllm.backends.inside"
_log = log("backends")


class _Place:
    """Where a module's template is, was, or will be."""

    def __init__(self, now_s: float) -> None:
        self.used_s = now_s
        self.template: asyncio.Future[Template | None] = asyncio.Future()
        """Pending: it starts. None, or one that has ended: there is none before the next try."""
        self.task: asyncio.Task[None] | None = None

    def abandon(self, _: object = None) -> None:
        """Whoever waits for it shall not any more."""
        if not self.template.done():
            self.template.set_result(None)


class Templates:
    """The template processes of an agent, at most one for each module. One event loop only."""

    def __init__(
        self,
        settings: BackendSettings,
        *,
        clock: Clock,
        environ: Mapping[str, str],
        run_dir: Path,
        log_dir: Path,
        package: str = PACKAGE,
    ) -> None:
        """`run_dir` is the agent's; a directory for each template is made in it. `package` is
        where the modules are looked up."""
        self._settings = settings
        self._clock = clock
        self._environment = clean_environment(environ)
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._package = package
        self._numbers = itertools.count()
        self._places: dict[str, _Place] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._alive: set[Template] = set()
        self._closed = False

    def warm(self, module: str) -> None:
        """Have a template of this module soon. At once, and nothing if there is one."""
        if self._closed:
            return
        place = self._places.get(module)
        if place is None:
            self._make_room()
            place = self._places[module] = _Place(self._clock.now_s())
            place.task = asyncio.create_task(self._keep(module, place), name=f"template-{module}")
            self._tasks.add(place.task)
            place.task.add_done_callback(place.abandon)
            place.task.add_done_callback(self._tasks.discard)
        place.used_s = self._clock.now_s()

    async def fork(self, module: str, argument: str, setting: Setting) -> Child | None:
        """An instance that runs the module's `main(argument)`; None when the template cannot
        give one in time: execute it then.

        Waits for a template that starts: who executes has the same imports before it.
        """
        self.warm(module)
        place = self._places.get(module)
        if place is None:
            return None
        starting = place.template
        await first(starting, self._clock.sleep(self._settings.template_wait_s))
        template = starting.result() if starting.done() else None
        place.used_s = self._clock.now_s()
        child = None if template is None else await template.fork(argument, setting)
        if child is None:
            _log.warning(
                "no fork of a template: executed instead",
                module=module,
                run_dir=setting.run_dir.name,
            )
        return child

    def distrust(self, module: str) -> None:
        """A fork of the template hangs: replace the template, after a pause."""
        place = self._places.get(module)
        if place is not None and place.template.done():
            template = place.template.result()
            if template is not None:
                _log.warning("a fork hangs: its template is replaced", module=module)
                template.end()

    async def close(self) -> None:
        """End the templates, and with them every instance that they forked. Idempotent."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for template in self._alive:
            template.kill()
        gone = asyncio.gather(*(template.gone for template in self._alive))
        await first(gone, self._clock.sleep(self._settings.kill_s))

    def _make_room(self) -> None:
        while len(self._places) >= self._settings.templates_max:
            module = min(self._places, key=lambda module: self._places[module].used_s)
            place = self._places.pop(module)
            if place.task is not None:
                place.task.cancel()

    async def _keep(self, module: str, place: _Place) -> None:
        """Have a template until it is idle; start another, after a pause, when it ends."""
        pause_s = self._settings.template_restart_s_min
        try:
            while True:
                began_s = self._clock.now_s()
                if await self._live(module, place):
                    return
                if self._clock.now_s() - began_s > self._settings.template_restart_s_max:
                    pause_s = self._settings.template_restart_s_min
                await self._clock.sleep(pause_s)
                place.template = asyncio.Future()
                pause_s = min(2 * pause_s, self._settings.template_restart_s_max)
        finally:
            if self._places.get(module) is place:
                del self._places[module]

    async def _live(self, module: str, place: _Place) -> bool:
        """The life of one template. True: it was ended because nobody used it."""
        template: Template | None = None
        try:
            template = self._start(module)
            if await template.wait_ready():
                place.used_s = self._clock.now_s()
                place.template.set_result(template)
                if await self._is_idle(place, template):
                    return True
            _report_end(module, template)
        except OSError as error:
            _log.warning("template cannot be started", module=module, reason=error.strerror)
        finally:
            place.abandon()
            if template is not None:
                template.end()
        return False

    def _start(self, module: str) -> Template:
        run_dir = self._run_dir / f"template-{next(self._numbers)}"
        run_dir.mkdir(mode=0o700)
        try:
            template = Template(
                f"{self._package}.{module}",
                run_dir=run_dir,
                log_path=self._log_dir / f"template-{module}.log",
                environment=self._environment,
                settings=self._settings,
                clock=self._clock,
            )
        except OSError:
            shutil.rmtree(run_dir, ignore_errors=True)
            raise
        self._alive.add(template)
        template.gone.add_done_callback(lambda _: self._alive.discard(template))
        return template

    async def _is_idle(self, place: _Place, template: Template) -> bool:
        """Wait until nobody has used it for long; False: it ended before."""
        while (left_s := place.used_s + self._settings.template_idle_s - self._clock.now_s()) > 0:
            await first(template.ended.wait(), self._clock.sleep(left_s))
            if template.ended.is_set():
                return False
        return True


def _report_end(module: str, template: Template) -> None:
    _log.warning("template failed: until there is another, instances are executed", module=module)
    for line in template.log_tail:
        _log.warning("template said", module=module, line=line)
