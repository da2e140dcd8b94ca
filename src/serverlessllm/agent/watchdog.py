"""Looks at busy instances: reads their own figures, and ends those that hang.

No event tells that nothing happens, so this is the one thing an agent looks at by the clock, and
only at instances that have something to do. Bytes that pass to clients, the engine's own count
of work and, for the silent, CPU time are the signs of life.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.instances import Instances
from serverlessllm.agent.reconcile import silence_s_max
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.procfs import session_cpu_s
from serverlessllm.core.clock import Clock
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.edge.upstream import UpstreamError, Upstreams
from serverlessllm.telemetry import log

_log = log("agent")


class Watchdog:
    """One task for all instances."""

    def __init__(
        self,
        instances: Instances,
        upstreams: Upstreams,
        settings: AgentSettings,
        clock: Clock,
        *,
        cpu_s: Callable[[int], float] = session_cpu_s,
    ) -> None:
        self._instances = instances
        self._upstreams = upstreams
        self._settings = settings
        self._clock = clock
        self._cpu_s = cpu_s

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self._clock.sleep(self._settings.watch_interval_s)
            worth = [each for each in self._instances.all() if _did_work(each)]
            await asyncio.gather(*(self._look(instance) for instance in worth))

    async def _look(self, instance: Instance) -> None:
        now_s = self._clock.now_s()
        self._note_bytes(instance, now_s)
        if now_s - instance.activity.read_s >= self._settings.stats_interval_s:
            instance.activity.read_s = now_s
            instance.activity.ended_read = instance.activity.ended
            await self._read_figures(instance)
            now_s = self._clock.now_s()
        instance.activity.looked_s = now_s
        if instance.process is None or instance.process.exited.done() or not instance.running:
            return
        activity = instance.activity
        if instance.arriving:  # its load has bounds of its own
            activity.moved_s = now_s
        silent_s = now_s - activity.moved_s
        allowed_s = silence_s_max(
            activity.gaps_s, self._settings.hang_s_min, self._settings.hang_gap_factor
        )
        if silent_s <= allowed_s:
            activity.cpu_s = None
            return
        if silent_s <= self._settings.hang_s_max and (
            now_s - activity.proven_s <= allowed_s or self._works(instance, now_s)
        ):
            return
        _log.error("instance hangs", instance=instance.id, silent_s=round(silent_s, 1))
        self._instances.kill(instance)

    def _works(self, instance: Instance, now_s: float) -> bool:
        """Whether a suspect used the CPU since the last look; the first look only measures."""
        assert instance.process is not None
        activity, before_s = instance.activity, instance.activity.cpu_s
        activity.cpu_s = self._cpu_s(instance.process.pid)
        if before_s is None:
            return True
        enough_s = self._settings.hang_cpu_share * self._settings.watch_interval_s
        if activity.cpu_s - before_s < enough_s:
            return False
        activity.proven_s = now_s
        activity.cpu_s = None
        return True

    def _note_bytes(self, instance: Instance, now_s: float) -> None:
        """Whether bytes have passed since the last look."""
        activity = instance.activity
        passed = activity.ended + sum(answer.link.passed_bytes for answer in activity.answers)
        if passed != activity.passed_bytes:
            activity.passed_bytes = passed
            self._moved(instance, now_s)

    def _moved(self, instance: Instance, now_s: float) -> None:
        """It was silent from the last move until the last look, at least."""
        activity = instance.activity
        activity.gaps_s.append(max(0.0, activity.looked_s - activity.moved_s))
        activity.moved_s = now_s

    async def _read_figures(self, instance: Instance) -> None:
        """The engine's own figures, if it has any and tells them."""
        backend = instance.backend
        if backend is None or backend.stats_path is None:
            return
        try:
            async with self._upstreams.send(
                instance.address,
                "GET",
                backend.stats_path,
                timeout_s=self._settings.stats_timeout_s,
            ) as response:
                body = await response.read()
                if response.status != 200:
                    return
        except UpstreamError:
            return
        try:
            stats = backend.parse_stats(body)
        except Exception:  # noqa: BLE001 - boundary of a plugin: its parser may raise anything
            _log.warning("figures cannot be read", instance=instance.id, backend=backend.name)
            return
        instance.kv_hit_rate = min(1.0, max(0.0, stats.kv_hit_rate))
        if stats.progress is not None and stats.progress != instance.activity.progress:
            if instance.activity.progress is not None:
                self._moved(instance, self._clock.now_s())
            instance.activity.progress = stats.progress


def _did_work(instance: Instance) -> bool:
    """Whether it works, or has worked since its figures were last read."""
    if instance.state not in {InstanceState.READY, InstanceState.DRAINING}:
        return False
    return instance.running > 0 or instance.activity.ended != instance.activity.ended_read
