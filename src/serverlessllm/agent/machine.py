"""What this machine offers, where the settings do not say."""

from __future__ import annotations

import os
from pathlib import Path

from serverlessllm.core.units import KIB
from serverlessllm.loader.settings import memory_bytes


def cpus() -> int:
    """Cores this process may run on, no more than its cgroup grants."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # another cgroup version, or "max"
        return cores


def available_memory_bytes() -> int:
    """Memory that could be taken now without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(memory_bytes(), int(line.split()[1]) * KIB)
    return memory_bytes() // 2
