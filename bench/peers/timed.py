"""What the script of every loader shares: one load, timed inside its own process.

Time runs from the call until every tensor is usable: one byte of each of its pages, and its last
byte, have been read. That reading is the same for all, and what it costs once everything is in
memory is subtracted. Imports are not counted. One line of JSON on standard output says the rest.

A virtual machine's host may have taken back memory that is free, and giving it again costs
seconds a GiB at the first touch, whoever touches it. So that chance does not decide who pays, as
much memory as a load may need is touched and given back just before.

This file runs in the environment of each peer: it needs torch and nothing of ours.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

PAGE_BYTES = 4096
BACKED_BYTES = "BENCH_BACKED_BYTES"
"""Variable: how much memory to touch and give back before the clock starts."""
_MADV_POPULATE_WRITE = 23


def timed(load: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Run `load` once and print what it took, or why it cannot."""
    _read_pages({"warm-up": torch.zeros(16 * PAGE_BYTES, dtype=torch.uint8)})
    before_bytes = _memory("VmRSS")
    _have_memory_backed(int(os.environ.get(BACKED_BYTES, "0")))
    _forget_peak()
    cpu_s, started_s = time.process_time(), time.perf_counter()
    try:
        tensors = load()
        called_s = time.perf_counter()
        total = _read_pages(tensors)
    except Exception as error:  # noqa: BLE001 - the reason is the result
        text = " ".join(str(error).split()) or "no message"
        print(json.dumps({"error": f"{type(error).__name__}: {text}"}))
        return
    read_s = time.perf_counter()
    cpu_s = time.process_time() - cpu_s
    _read_pages(tensors)
    again_s = time.perf_counter() - read_s
    found = {
        "seconds": read_s - started_s - again_s,
        "call_s": called_s - started_s,
        "reading_s": again_s,
        "cpu_s": max(0.0, cpu_s - again_s),
        "memory_bytes": _memory("VmHWM") - before_bytes,
        "size_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "tensors": len(tensors),
        "sum": total,
    }
    print(json.dumps(found), flush=True)


def _read_pages(tensors: Mapping[str, torch.Tensor]) -> int:
    """The sum of a byte of each page, equal for equal weights."""
    total = 0
    with torch.no_grad():
        for tensor in tensors.values():
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            total += int(flat[::PAGE_BYTES].sum(dtype=torch.int64)) + int(flat[-1])
    return total


def _have_memory_backed(size_bytes: int) -> None:
    """In huge pages: a host takes back no smaller pieces."""
    if size_bytes:
        with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory.madvise(_MADV_POPULATE_WRITE)


def _memory(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM`: mapped pages of files count too."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak before the load cannot be forgotten here", file=sys.stderr)
