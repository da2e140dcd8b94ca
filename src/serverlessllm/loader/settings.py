"""What the loader can be told, and what it takes from the machine when it is not told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

import msgspec
from blake3 import blake3

from serverlessllm.core.units import MIB

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class LoaderSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The tiers of one node."""

    dram_dir: str | None = None
    """Directory of the DRAM tier, on a tmpfs; None: one under /dev/shm for this data directory."""
    dram_budget_bytes: int | None = None
    """Most bytes of checkpoints in the DRAM tier; None: a quarter of the memory."""
    nvme_dir: str | None = None
    """Directory of the nvme tier; None: `nvme` in the data directory."""
    nvme_budget_bytes: int | None = None
    """Most bytes in the nvme tier; 0: no nvme tier; None: half of the disk that is free."""
    range_bytes: int = 8 * MIB
    """One ranged read from the store."""
    ranges_in_flight_max: int = 8
    """Ranged reads from the store at once, of one load."""
    copy_threads: int = 6
    """Chunks that one load reads, checks or writes at once between the tiers of this node."""
    chunk_tries_max: int = 3
    """Times a chunk that fails its digest is fetched from the store before the load fails."""
    peer_wait_s_max: float = 900.0
    """Longest wait for another process of this machine that is loading the same checkpoint."""
    peer_poll_s: float = 0.02
    """Between two looks whether that process has finished."""
    progress_interval_s: float = 0.05
    """Least time between two progress reports of one load."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where weights go last: `cpu`, engines map them in DRAM; `cuda`, the memory of NVIDIA GPUs
    (needs the `torch` extra)."""
    device_numbers: tuple[int, ...] | None = None
    """The GPUs to use, as CUDA numbers them; None: all."""
    device_budget_bytes: int | None = None
    """Most bytes of checkpoints on each GPU; None: half of its memory."""
    indexes_cached_max: int = 128
    """Decoded `.idx` files kept in memory."""


def default_dram_dir(data_dir: Path) -> Path:
    """`/dev/shm/sllm-<uid>-<8 hex of the data directory's digest>`."""
    digest = blake3(os.fsencode(data_dir.resolve())).hexdigest()[:8]
    return Path("/dev/shm") / f"sllm-{os.getuid()}-{digest}"  # noqa: S108 - the tier is a tmpfs


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or the cgroup's limit when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # no such controller here, or "max"
            continue
    return total


def default_dram_budget_bytes(dram_dir: Path) -> int:
    """A quarter of the memory, but no more than the file system of `dram_dir` holds."""
    return min(memory_bytes() // 4, shutil.disk_usage(_existing(dram_dir)).total)


def default_nvme_budget_bytes(nvme_dir: Path) -> int:
    """Half of the disk that is free, what the tier already holds counted as free."""
    held = 0
    if nvme_dir.is_dir():
        held = sum(entry.stat().st_size for entry in os.scandir(nvme_dir) if entry.is_file())
    return (shutil.disk_usage(_existing(nvme_dir)).free + held) // 2


def _existing(path: Path) -> Path:
    """`path` or its nearest ancestor that exists."""
    return path if path.exists() or path == path.parent else _existing(path.parent)
