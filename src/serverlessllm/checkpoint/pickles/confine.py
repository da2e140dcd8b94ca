"""What a process gives up before it reads a stranger's bytes: files, processes, time, memory.

Limits of the kernel hold everywhere. Where it has seccomp for this machine (x86-64, arm64), a
filter also ends the process at any system call but those of a computation: no file, socket,
process or executable page can be made. Reference: `Documentation/userspace-api/seccomp_filter.rst`
and `include/uapi/linux/{filter,seccomp,audit}.h` of Linux.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from typing import Final

from serverlessllm.core.units import MIB

ADDRESS_SPACE_BYTES: Final = 512 * MIB
"""Python itself maps 20 to 40 MiB; the interpreter's own bounds are far below."""
CPU_S: Final = 20
"""For a machine that is ten times slower than any that we know."""

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_AT_NUMBER, _AT_ARCH, _AT_ARGUMENTS = 0, 4, 16
_PROT_EXEC = 4
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""As audit records number them."""
_CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "brk": (12, 214),
    "madvise": (28, 233),
    "futex": (202, 98),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "clock_gettime": (228, 113),
    "getrandom": (318, 278),
    "restart_syscall": (219, 128),
}
"""Their numbers on those machines, in that order."""
_ARGUMENTS = {"read": (0, 0), "write": (0, 1)}
"""Calls that are allowed on one descriptor only: which argument, which value."""


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine(parent: int) -> bool:
    """Give up all but computing, reading descriptor 0 and writing descriptor 1. For good.

    Ends with the process `parent`. Returns whether the seccomp filter holds too.

    Raises:
        OSError: a limit could not be set.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _control(libc, _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise OSError("the parent is gone")
    _control(libc, _PR_SET_NO_NEW_PRIVS, 1)
    for kind, limit in (
        (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
        (resource.RLIMIT_CPU, CPU_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),  # those that are open stay open
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowest, lowest))
    return _filter_calls(libc)


def _control(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _filter_calls(libc: ctypes.CDLL) -> bool:
    machine = os.uname().machine
    if machine not in _MACHINES or struct.calcsize("P") != 8:
        return False
    column = list(_MACHINES).index(machine)
    code = _program(_MACHINES[machine], {call: numbers[column] for call, numbers in _CALLS.items()})
    program = _Program(len(code) // 8, code)
    answer = libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    return bool(answer == 0)  # else a kernel without it, or a container that forbids it


def _program(arch: int, numbers: dict[str, int]) -> bytes:
    """`struct sock_filter`s: code, jump if true, jump if false, operand."""

    def row(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, operand)

    rows = [
        row(_LOAD, _AT_ARCH),
        row(_EQUAL, arch, 1, 0),
        row(_RETURN, _KILL),
        row(_LOAD, _AT_NUMBER),
    ]
    for call, number in numbers.items():
        if call in _ARGUMENTS:
            argument, value = _ARGUMENTS[call]
            test = [row(_LOAD, _AT_ARGUMENTS + 8 * argument), row(_EQUAL, value, 0, 1)]
        elif call in {"mmap", "mprotect"}:
            test = [row(_LOAD, _AT_ARGUMENTS + 8 * 2), row(_ANY_BIT, _PROT_EXEC, 1, 0)]
        else:
            test = []
        verdict = [*test, row(_RETURN, _ALLOW)] + ([row(_RETURN, _KILL)] if test else [])
        rows += [row(_EQUAL, number, 0, len(verdict)), *verdict]
    return b"".join([*rows, row(_RETURN, _KILL)])
