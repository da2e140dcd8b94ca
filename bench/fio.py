"""What fio reads a file with: the machine's own limit, by somebody else's hand."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

from serverlessllm.core.units import MIB

_SAMPLE_BYTES = 256 * MIB


class Way(NamedTuple):
    """One set of fio's options."""

    engine: str
    depth: int
    jobs: int
    block_kib: int

    def __str__(self) -> str:
        jobs = f"{self.jobs} jobs, " if self.jobs > 1 else ""
        return f"{self.engine}, {jobs}depth {self.depth}, blocks of {self.block_kib} KiB"


WAYS = (
    *(Way("psync", 1, jobs, block) for jobs in (1, 4) for block in (1024, 4096)),
    *(
        Way(engine, depth, 1, block)
        for engine in ("libaio", "io_uring")
        for depth in (4, 16)
        for block in (512, 1024, 4096)
    ),
)


def best_way(path: Path) -> Way:
    """The quickest on the first part of the file, of two tries each; engines that the machine
    does not have drop out.

    Raises:
        RuntimeError: fio runs with none of them.
    """
    sample = min(path.stat().st_size, _SAMPLE_BYTES)
    rates: dict[Way, float] = {}
    for way in (*WAYS, *WAYS):
        rate = read(path, way, sample)
        if rate is not None:
            rates[way] = max(rate, rates.get(way, 0.0))
    if not rates:
        raise RuntimeError(f"fio cannot read {path} with any engine")
    return max(rates, key=lambda way: rates[way])


def read(path: Path, way: Way, size_bytes: int) -> float | None:
    """Bytes/s of one sequential direct read of so much of the file; None: not with this engine."""
    share = size_bytes // way.jobs // (4 * MIB) * (4 * MIB)
    command = (
        *("fio", "--name=read", f"--filename={path}", "--readonly", "--rw=read", "--direct=1"),
        *(f"--ioengine={way.engine}", f"--iodepth={way.depth}", f"--bs={way.block_kib}k"),
        *(f"--numjobs={way.jobs}", f"--size={share}", f"--offset_increment={share}"),
        *("--thread", "--group_reporting", "--output-format=json"),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        return None
    (job,) = json.loads(done.stdout)["jobs"]
    return float(job["read"]["bw_bytes"])
