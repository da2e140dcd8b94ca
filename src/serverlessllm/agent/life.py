"""The life of an instance, from its place in the queue to the end of its process."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from serverlessllm.agent.downloads import Downloads
from serverlessllm.agent.instance import Instance
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.agent.weights import Weights
from serverlessllm.backends.base import Backend, Launch, LaunchPlan, Node, Offer, Refusal
from serverlessllm.backends.logs import prune_logs
from serverlessllm.backends.process import BackendProcess, until_answering
from serverlessllm.backends.registry import Backends
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.templates import Templates
from serverlessllm.backends.waits import first
from serverlessllm.checkpoint.index import Index
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import BackendDied, LoadFailed
from serverlessllm.core.failures import single_error
from serverlessllm.core.lifecycle import InstanceState
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.telemetry import log, span

_log = log("agent")

GetRoom = Callable[[Instance, int], Awaitable[None]]
"""Wait until the instance has room for so many bytes of memory; raises when there is none."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What instances live on."""

    settings: AgentSettings
    processes: BackendSettings
    backends: Backends
    downloads: Downloads
    upstreams: Upstreams
    clock: Clock
    node: Node
    run_dir: Path
    """The agent's own; one directory an instance is made in it."""
    log_dir: Path
    environ: Mapping[str, str]
    """Of the agent; an instance gets a part of it."""
    templates: Templates | None = None
    """None: every instance is executed."""


class Crashed(BackendDied):
    """The backend's process ended by itself."""


async def live(instance: Instance, host: Host, get_room: GetRoom) -> None:
    """Load, start, serve until asked to stop; returns when everything is given back.

    The load is a task beside the rest: an engine that can is started while its bytes still move,
    and the load's failure ends whatever the instance does.

    Raises:
        Crashed: the process ended while it served.
        SLLMError: it never became ready, or its bytes did not come.
    """
    problem = host.backends.problem(instance.spec.backend) if instance.spec.backend else None
    if problem is not None:
        raise LoadFailed(f"backend {instance.spec.backend!r}: {problem.reason}")
    async with contextlib.AsyncExitStack() as held:
        await get_room(instance, 0)
        instance.advance(InstanceState.LOADING)
        weights = Weights(instance, host.downloads, host.clock)
        held.callback(weights.release)
        with single_error():
            async with asyncio.TaskGroup() as group:
                load = group.create_task(weights.load(), name=f"agent-load-{instance.id}")
                try:
                    await first(load, weights.known)
                    process = await _start(instance, host, get_room, weights, load, held)
                    await _serve(instance, process)
                finally:
                    load.cancel()


async def _start(
    instance: Instance,
    host: Host,
    get_room: GetRoom,
    weights: Weights,
    load: asyncio.Task[None],
    held: contextlib.AsyncExitStack,
) -> BackendProcess | None:
    """The process, ready; None when the server is somebody else's."""
    backend, offer = _choose(instance, host, weights.index)
    if offer.template is not None and host.templates is not None:
        host.templates.warm(offer.template)
    if not offer.layered:
        await asyncio.wait((load,))
    instance.slots = offer.slots
    await get_room(instance, offer.memory_bytes)
    started_s = host.clock.now_s()
    instance.advance(InstanceState.STARTING)
    with span(
        "agent.start",
        loud=True,
        model=instance.model,
        backend=backend.name,
        arriving=weights.arriving and offer.layered,
    ):
        process = await _launch(instance, host, backend, offer, weights, held)
    instance.became_ready(host.clock.now_s(), started_s)
    return process


def _choose(instance: Instance, host: Host, index: Index | None) -> tuple[Backend, Offer]:
    chosen = host.backends.choose(instance.spec, index, host.node)
    if isinstance(chosen, Refusal):
        raise LoadFailed(f"no backend here can serve {instance.model}: {chosen.reason}")
    return chosen


async def _launch(
    instance: Instance,
    host: Host,
    backend: Backend,
    offer: Offer,
    weights: Weights,
    held: contextlib.AsyncExitStack,
) -> BackendProcess | None:
    run_dir = host.run_dir / instance.id.rpartition("-")[2]
    run_dir.mkdir(mode=0o700)
    held.callback(shutil.rmtree, run_dir, ignore_errors=True)
    instance.backend = backend
    index_path = await weights.index_path(run_dir)
    plan = instance.plan = backend.launch(
        Launch(
            instance=instance.id,
            spec=instance.spec,
            index=weights.index,
            model_path=weights.bin_path,
            index_path=index_path,
            run_dir=run_dir,
            node=host.node,
            slots=instance.slots,
            arriving=weights.arriving,
        )
    )
    if not plan.command:
        await _reach(plan, host)
        return None
    prune_logs(host.log_dir, host.processes.log_files_max)
    with contextlib.ExitStack() as lent:
        process = instance.process = BackendProcess(
            plan,
            run_dir=run_dir,
            log_path=host.log_dir / f"{instance.id}.log",
            environ=host.environ,
            settings=host.processes,
            clock=host.clock,
            descriptors=weights.lend(lent) if offer.layered else {},
            templates=host.templates,
        )
    held.push_async_callback(process.stop)
    held.callback(weights.hang_up)
    try:
        await process.wait_ready(host.upstreams)
    except LoadFailed:
        _report_end(instance, process)
        raise
    return process


async def _reach(plan: LaunchPlan, host: Host) -> None:
    """Wait until somebody else's server answers."""
    answers = asyncio.ensure_future(
        until_answering(plan, host.upstreams, host.clock, host.processes)
    )
    try:
        await first(answers, host.clock.sleep(plan.ready_timeout_s))
        if not answers.done():
            raise LoadFailed(
                f"the model's url did not answer 200 on {plan.ready_path} within "
                f"{plan.ready_timeout_s:g} s"
            )
        answers.result()
    finally:
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)


async def _serve(instance: Instance, process: BackendProcess | None) -> None:
    """Until the process ends (a crash) or the instance shall stop; then drain."""
    await _until(instance.stopping, instance, process)
    instance.advance(InstanceState.DRAINING)
    if instance.running:
        instance.idle = asyncio.get_running_loop().create_future()
        await _until(instance.idle, instance, process)


async def _until(
    event: asyncio.Future[None], instance: Instance, process: BackendProcess | None
) -> None:
    """Return when `event` is done, unless the process ends before."""
    await first(event, *(() if process is None else (process.exited,)))
    if process is not None and process.exited.done():
        raise _crash(instance, process)


def _crash(instance: Instance, process: BackendProcess) -> Crashed:
    _report_end(instance, process)
    return Crashed(
        f"the backend ended with status {process.exited.result()}; "
        "the agent's log has its last lines"
    )


def _report_end(instance: Instance, process: BackendProcess) -> None:
    """The backend's last words, in the agent's log (never to a client)."""
    status = process.exited.result() if process.exited.done() else None
    _log.warning("backend ended", instance=instance.id, status=status)
    for line in process.log_tail:
        _log.warning("backend said", instance=instance.id, line=line)
