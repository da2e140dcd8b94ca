"""`sllm doctor`: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Coroutine, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from serverlessllm.cli import options

if TYPE_CHECKING:
    from serverlessllm.config.load import Loaded


class Health(StrEnum):
    """Of one finding."""

    GOOD = "ok"
    POOR = "warn"
    """Works, but not as it could."""
    BAD = "fail"
    """`sllm serve` will not work."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    health: Health
    text: str
    fix: str = ""


def doctor(
    data_dir: options.DataDir = None,
    config: options.Config = None,
    overrides: options.Set = None,
    url: options.Url = None,
    json: options.Json = False,
) -> None:
    """Examine this machine; each finding with its fix."""
    from serverlessllm.cli.output import print_json

    loaded = options.settings(config, data_dir, overrides)
    findings: list[Finding] = []
    for finding in _look(loaded, url):
        findings.append(finding)
        if not json:
            _print(finding)
    if json:
        print_json([finding._asdict() for finding in findings])
    if any(finding.health is Health.BAD for finding in findings):
        raise typer.Exit(1)


def _look(loaded: Loaded, url: str | None) -> Iterator[Finding]:
    yield _cores()
    yield _memory()
    yield _dram(loaded)
    yield _disk(loaded)
    yield from _bandwidth(loaded)
    yield from _backends()
    yield _store(loaded)
    yield _metadata(loaded)
    yield _server(url)


def _print(finding: Finding) -> None:
    from rich.console import Console

    colour = {Health.GOOD: "green", Health.POOR: "yellow", Health.BAD: "red"}[finding.health]
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"[{colour}]{finding.health.value:>4}[/{colour}]  [bold]{finding.name}[/bold]: ", end=""
    )
    console.print(finding.text, markup=False)
    if finding.fix:
        console.print(f"      → {finding.fix}", markup=False)


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    busy = os.getloadavg()[0]
    text = f"{cores} usable, load {busy:.1f}"
    if busy > 2 * cores:
        return Finding(
            name="cores",
            health=Health.POOR,
            text=text,
            fix="other programs keep the cores busy: answers will be slower than measured",
        )
    return Finding(name="cores", health=Health.GOOD, text=text)


def _memory() -> Finding:
    from serverlessllm.core.units import GIB, format_size
    from serverlessllm.loader.settings import memory_bytes

    total = memory_bytes()
    small = total < 2 * GIB
    return Finding(
        name="memory",
        health=Health.POOR if small else Health.GOOD,
        text=f"{format_size(total)} for this process",
        fix="under 2 GiB: set a small loader.dram_budget_bytes, use small models" if small else "",
    )


def _dram(loaded: Loaded) -> Finding:
    from serverlessllm.core.units import GIB, format_size
    from serverlessllm.loader.settings import default_dram_budget_bytes, default_dram_dir

    settings = loaded.settings.loader
    directory = Path(settings.dram_dir or default_dram_dir(loaded.paths.data_dir))
    mount = _existing(directory)
    if _file_system(mount) != "tmpfs":
        return Finding(
            name="dram tier",
            health=Health.BAD if settings.dram_dir is None else Health.POOR,
            text=f"{directory} is not on a tmpfs",
            fix="mount a tmpfs on /dev/shm, or set loader.dram_dir to a directory on one",
        )
    if not os.access(mount, os.W_OK):
        return Finding(
            name="dram tier",
            health=Health.BAD,
            text=f"{mount} is not writable",
            fix="chmod 1777 /dev/shm, or set loader.dram_dir",
        )
    budget = settings.dram_budget_bytes or default_dram_budget_bytes(directory)
    free = shutil.disk_usage(mount).free
    text = f"{directory}, budget {format_size(budget)}, {format_size(free)} free"
    if free < min(settings.dram_budget_bytes or GIB, GIB):
        return Finding(
            name="dram tier",
            health=Health.POOR,
            text=text,
            fix="enlarge it (in a container: --shm-size 8g), or lower loader.dram_budget_bytes",
        )
    return Finding(name="dram tier", health=Health.GOOD, text=text)


def _disk(loaded: Loaded) -> Finding:
    from serverlessllm.core.units import GIB, format_size
    from serverlessllm.loader.settings import default_nvme_budget_bytes

    directory = loaded.paths.data_dir
    here = _existing(directory)
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        return Finding(
            name="disk",
            health=Health.BAD,
            text=f"{here} is not writable",
            fix="name a directory of yours: --data-dir, SLLM_DATA_DIR",
        )
    budget = loaded.settings.loader.nvme_budget_bytes
    if budget is None:
        budget = default_nvme_budget_bytes(loaded.paths.nvme_dir)
    text = f"{directory}, {format_size(free)} free, nvme budget {format_size(budget)}"
    if free < 2 * GIB:
        return Finding(
            name="disk",
            health=Health.POOR,
            text=text,
            fix="free space, or put --data-dir on a larger disk: models are large",
        )
    return Finding(name="disk", health=Health.GOOD, text=text)


def _bandwidth(loaded: Loaded) -> Iterator[Finding]:
    from serverlessllm.core.units import GIB, MIB, format_size
    from serverlessllm.loader.measure import measure_disk, measure_memcpy

    memory = measure_memcpy()
    yield Finding(
        name="memory bandwidth",
        health=Health.GOOD if memory > GIB else Health.POOR,
        text=f"{format_size(memory)}/s (one core copying)",
    )
    directory = _existing(loaded.paths.data_dir)
    try:
        disk = measure_disk(directory)
    except OSError as error:
        yield Finding(
            name="disk bandwidth",
            health=Health.POOR,
            text=f"{directory}: {error.strerror}",
            fix="free space there, or name another --data-dir",
        )
        return
    slow = disk < 200 * MIB
    yield Finding(
        name="disk bandwidth",
        health=Health.POOR if slow else Health.GOOD,
        text=f"{format_size(disk)}/s (reading past the page cache)",
        fix="slow: cold starts wait for it; put --data-dir on an SSD" if slow else "",
    )


def _backends() -> Iterator[Finding]:
    from serverlessllm.backends.registry import Backends

    backends = Backends()
    for name in backends.names:
        problem = backends.problem(name)
        yield Finding(
            name=f"backend {name}",
            health=Health.GOOD if problem is None else Health.POOR,
            text="ready" if problem is None else problem.reason,
        )
    if not backends.usable:
        yield Finding(
            name="backends",
            health=Health.BAD,
            text="none is usable",
            fix="pip install 'serverlessllm[llamacpp]'",
        )


def _store(loaded: Loaded) -> Finding:
    from serverlessllm import bootstrap

    fix = "check store_url and [store] (sllm config check), and that the service runs"
    return _reach("store", bootstrap.probe_store(loaded), fix)


def _metadata(loaded: Loaded) -> Finding:
    from serverlessllm import bootstrap

    fix = "check the rights on the data directory and the space left on its disk"
    return _reach("metadata", bootstrap.probe_metadata(loaded), fix)


def _reach(name: str, probe: Coroutine[None, None, str], fix: str) -> Finding:
    import asyncio

    from serverlessllm.core.errors import SLLMError

    try:
        return Finding(name=name, health=Health.GOOD, text=asyncio.run(probe))
    except SLLMError as error:
        return Finding(name=name, health=Health.BAD, text=error.message, fix=fix)
    except OSError as error:
        return Finding(name=name, health=Health.BAD, text=str(error), fix=fix)


def _server(url: str | None) -> Finding:
    from serverlessllm.cli.client import connect
    from serverlessllm.cli.failure import Failure
    from serverlessllm.orchestrator.rest.wire import Version

    try:
        client = connect(url)
        version = client.get("/api/version", Version).version
    except Failure as failure:
        return Finding(name="server", health=Health.POOR, text=str(failure), fix=failure.cure)
    return Finding(name="server", health=Health.GOOD, text=f"{client.url}, version {version}")


def _existing(path: Path) -> Path:
    """`path` or its nearest ancestor that exists: doctor looks, it makes nothing."""
    return path if path.exists() or path == path.parent else _existing(path.parent)


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`."""
    best, kind = "", ""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, found, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if path.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, found
    return kind
