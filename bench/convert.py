"""Conversion of a safetensors file, hashed and read back, beside `cp` and fsync of that file.

    python -m bench.convert [SIZE] [--rounds N] [--dir DIR]

Each round copies and converts in turn, both with the source dropped from the page cache and
nothing waiting to be written. Prints medians of N rounds (5 by default), their ratio in each round,
and the peak memory of the converter, which is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from serverlessllm.core.units import MIB, format_size, parse_size_bytes

_TENSOR_BYTES = 32 * MIB

_CONVERT = """
import sys
from pathlib import Path
from time import perf_counter
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources.base import open_folder

started = perf_counter()
convert(open_folder(Path(sys.argv[1]), model="bench"), Path(sys.argv[2]))
seconds = perf_counter() - started
status = Path("/proc/self/status").read_text().splitlines()
peak_kib = next(line.split()[1] for line in status if line.startswith("VmHWM"))
print(seconds, peak_kib)
"""


def write_source(folder: Path, size_bytes: int) -> Path:
    """A safetensors file of random bytes, in tensors of 32 MiB."""
    folder.mkdir()
    count = max(size_bytes // _TENSOR_BYTES, 1)
    header = {
        f"model.layers.{number}.weight": {
            "dtype": "BF16",
            "shape": [_TENSOR_BYTES // 2],
            "data_offsets": [number * _TENSOR_BYTES, (number + 1) * _TENSOR_BYTES],
        }
        for number in range(count)
    }
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(count):
            file.write(os.urandom(_TENSOR_BYTES))
        file.flush()
        os.fsync(file.fileno())
    return path


def settle(source: Path) -> None:
    """Nothing is left to write, and the source is only on the disk."""
    os.sync()
    fd = os.open(source, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def copy_s(source: Path, work: Path) -> float:
    """Seconds of `cp` and fsync."""
    target = work / "copy"
    started = perf_counter()
    subprocess.run(["cp", "--reflink=never", str(source), str(target)], check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    seconds = perf_counter() - started
    target.unlink()
    return seconds


def convert_s(source: Path, work: Path, peaks_kib: list[int]) -> float:
    """Seconds of a conversion, the start of its process not counted."""
    out = work / "out"
    command = [sys.executable, "-c", _CONVERT, str(source.parent), str(out)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak_kib = ended.stdout.split()
    peaks_kib.append(int(peak_kib))
    shutil.rmtree(out)
    return float(seconds)


def run(size_bytes: int, rounds: int, work: Path) -> None:
    source = write_source(work / "raw", size_bytes)
    size = source.stat().st_size
    peaks_kib: list[int] = []
    measures: dict[str, Callable[[], float]] = {
        "cp + fsync": lambda: copy_s(source, work),
        "convert": lambda: convert_s(source, work, peaks_kib),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            settle(source)
            seconds[name].append(measure())
    print(f"{format_size(size)} of safetensors, median of {rounds}, source not in the page cache")
    for name, samples in seconds.items():
        median = statistics.median(samples)
        spread = f"{min(samples):.2f} to {max(samples):.2f} s"
        print(f"{name:12} {size / median / 1e9:6.2f} GB/s   {median:6.2f} s   {spread}")
    ratios = [copy / own for copy, own in zip(*seconds.values(), strict=True)]
    print(
        f"convert is {statistics.median(ratios):.2f} of cp + fsync (median of the rounds' ratios)"
    )
    print(f"peak memory of the converter: {max(peaks_kib) / 1024:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("size", nargs="?", default="1GiB", type=parse_size_bytes)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk to measure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sllm-bench-", dir=options.dir) as work:
        run(options.size, options.rounds, Path(work))


if __name__ == "__main__":
    main()
