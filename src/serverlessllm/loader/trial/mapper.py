"""The second process of a trial: maps a checkpoint that is in DRAM, as an engine would.

Its standard input is a socket, over which the file's descriptor comes; `READY` on its standard
output asks for it, a line with a `Found` answers.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from pathlib import Path
from time import monotonic, process_time

import msgspec

from serverlessllm.core.units import MIB

READY = b"ready\n"
_COPY_BYTES = 32 * MIB
_MEMCPY_ROUNDS = 3


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the second process saw. Times are CLOCK_MONOTONIC's: the same in all processes."""

    mapped_s: float
    """When it had the first and the last byte in its hands."""
    read_s: float
    """When it had read every byte."""
    cpu_s: float
    memcpy_bytes_s: float
    """What one thread of it copies from memory that it has touched before."""
    seen_bytes: int
    """Of the file, in this process's memory."""
    copied_bytes: int
    """Of those, private copies."""


def main() -> None:
    """Run once."""
    channel = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    buffer = memoryview(bytearray(_COPY_BYTES))
    memcpy_bytes_s = _memcpy(buffer)
    _say(READY)
    _, (fd,), _, _ = socket.recv_fds(channel, 1, 1)
    size = os.fstat(fd).st_size
    begun_s = process_time()
    mapping = memoryview(mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))
    buffer[:2] = bytes((mapping[0], mapping[-1]))
    mapped_s = monotonic()
    for offset in range(0, size, _COPY_BYTES):
        part = mapping[offset : offset + _COPY_BYTES]
        buffer[: len(part)] = part
    read_s = monotonic()
    seen_bytes, copied_bytes = _memory_of(fd)
    found = Found(
        mapped_s=mapped_s,
        read_s=read_s,
        cpu_s=process_time() - begun_s,
        memcpy_bytes_s=memcpy_bytes_s,
        seen_bytes=seen_bytes,
        copied_bytes=copied_bytes,
    )
    _say(msgspec.json.encode(found) + b"\n")


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _memcpy(target: memoryview) -> float:
    source = memoryview(bytearray(len(target)))
    seconds = []
    for _ in range(_MEMCPY_ROUNDS):
        started_s = monotonic()
        target[:] = source
        seconds.append(monotonic() - started_s)
    return len(target) / min(seconds)


def _memory_of(fd: int) -> tuple[int, int]:
    """Bytes of a file that this process maps and has touched, and how many are private copies:
    what the kernel counts as anonymous."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    counted = {"Rss:": 0, "Anonymous:": 0}
    inside = False
    with Path("/proc/self/smaps").open("rb") as smaps:
        for line in smaps:
            words = line.decode(errors="replace").split()
            if not words[0].endswith(":"):
                inside = words[3:5] == [device, str(status.st_ino)]
            elif inside and words[0] in counted:
                counted[words[0]] += int(words[1]) * 1024
    return counted["Rss:"], counted["Anonymous:"]


if __name__ == "__main__":
    main()
