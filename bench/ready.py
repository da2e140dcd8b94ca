"""How long the transformers backend takes to be ready on weights that are in DRAM: forked from its
template, or executed; beside a process that starts with `from_pretrained`."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from time import perf_counter

import msgspec
from bench.place import peer

from serverlessllm.backends.base import Launch, LaunchPlan, Node, Offer
from serverlessllm.backends.process import BackendProcess
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.templates import Templates
from serverlessllm.backends.transformers import Transformers
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import Index
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import InstanceId, ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.loader.trial.place import private_directory
from serverlessllm.testing.hf import smollm2_folder

_MODEL = ModelId("smollm2")


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from asking for an instance (or a process) until it can answer, a sample a round."""

    forked_s: list[float]
    executed_s: list[float]
    from_pretrained_s: list[float]
    size_bytes: int


def measure_ready(cache: Path, rounds: int) -> Ready:
    """SmolLM2-135M, in `cache` from an earlier run."""
    return asyncio.run(_measure(smollm2_folder(cache), rounds))


async def _measure(folder: Path, rounds: int) -> Ready:
    tmp = Path(tempfile.gettempdir())
    with private_directory(Path("/dev/shm")) as dram, private_directory(tmp) as run:
        lies = dram / "checkpoint"
        lies.mkdir()
        made = convert(open_folder(folder, model=_MODEL, revision="r1"), lies)
        plans = _Plans(made.bin_path, made.idx_path, made.index, run)
        clock, settings = SystemClock(), BackendSettings()
        upstreams = Upstreams(UpstreamSettings(), clock)
        templates = Templates(settings, clock=clock, environ=os.environ, run_dir=run, log_dir=run)
        ready = Ready(forked_s=[], executed_s=[], from_pretrained_s=[], size_bytes=made.size_bytes)
        try:
            await _start(plans.next(), upstreams, settings, templates)  # the template's imports
            for _ in range(rounds):
                ready.forked_s.append(await _start(plans.next(), upstreams, settings, templates))
                ready.executed_s.append(await _start(plans.next(), upstreams, settings, None))
                ready.from_pretrained_s.append(await asyncio.to_thread(_from_pretrained, folder))
        finally:
            await templates.close()
            await upstreams.close()
        return ready


class _Plans:
    """A fresh run directory and plan for each instance."""

    def __init__(self, bin_path: Path, index_path: Path, index: Index, run: Path) -> None:
        self._paths = bin_path, index_path
        self._index = index
        self._run = run
        self._count = 0

    def next(self) -> tuple[LaunchPlan, Path]:
        self._count += 1
        run_dir = self._run / str(self._count)
        run_dir.mkdir(mode=0o700)
        spec = ModelSpec(model=_MODEL, options={"context": "2048"})
        node = Node(cpus=len(os.sched_getaffinity(0)), dram_free_bytes=1 << 34)
        backend = Transformers()
        offer = backend.can_serve(spec, self._index, node)
        assert isinstance(offer, Offer), offer
        launch = Launch(
            instance=InstanceId(f"bench-{self._count}"),
            spec=spec,
            index=self._index,
            model_path=self._paths[0],
            index_path=self._paths[1],
            run_dir=run_dir,
            node=node,
            slots=offer.slots,
        )
        return backend.launch(launch), run_dir


async def _start(
    plan: tuple[LaunchPlan, Path],
    upstreams: Upstreams,
    settings: BackendSettings,
    templates: Templates | None,
) -> float:
    started_s = perf_counter()
    process = BackendProcess(
        plan[0],
        run_dir=plan[1],
        log_path=plan[1].with_suffix(".log"),
        environ=os.environ,
        settings=settings,
        clock=SystemClock(),
        templates=templates,
    )
    try:
        await process.wait_ready(upstreams)
        return perf_counter() - started_s
    finally:
        await process.stop()


def _from_pretrained(folder: Path) -> float:
    started_s = perf_counter()
    done = peer("transformers", "ready", folder)
    if done.stdout.strip() != "ready":
        raise RuntimeError(f"from_pretrained failed: {done.stderr[-500:]}")
    return perf_counter() - started_s
