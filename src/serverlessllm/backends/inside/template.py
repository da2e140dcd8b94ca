"""A template: an engine's libraries imported once, every instance a fork of that.

`python -m serverlessllm.backends.inside.template MODULE`, three kinds of process from one file:

- The **keeper** is what the agent started. It imports nothing and forks the template. It adopts
  each instance (`PR_SET_CHILD_SUBREAPER`), tells the agent how it ended, and dies with the agent.
- The **template** calls the module's `preload()`, which imports and never computes: one thread, no
  open file. Then it keeps one fork at hand.
- An **instance** is forked ahead, and twice, so that it is the keeper's child: it outlives the
  template and dies with the keeper. It takes a request, asks the agent's leave, and runs the
  module's `main(argument)`.

The agent's side, and what goes over the sockets, is `serverlessllm.backends.template`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

REQUESTS_FD = "SLLM_TEMPLATE_REQUESTS_FD"
"""Variable: their end of the socket that requests come by."""
ENDS_FD = "SLLM_TEMPLATE_ENDS_FD"
"""Variable: the keeper's end of the socket that it tells ends by."""
MESSAGE_BYTES_MAX = 128 * 1024
"""A command line's last word is not longer either."""
DESCRIPTORS_MAX = 16

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *4 * (ctypes.c_ulong,))


class Order(NamedTuple):
    """What an instance is to be."""

    leash: int
    """To the agent: our pid goes there, its leave comes from there; when it closes, we end."""
    output: int
    argument: str
    run_dir: str
    environment: dict[str, str]
    """With the numbers that the passed descriptors have here."""


def start(module: str) -> int:
    """The keeper's life, or the template's, or an instance's: whichever this process becomes."""
    requests = socket.socket(fileno=int(os.environ.pop(REQUESTS_FD)))
    ends = socket.socket(fileno=int(os.environ.pop(ENDS_FD)))
    keeper = os.getpid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.fork():
        _be_called("keeper")
        requests.close()
        keep(ends)
        return 0
    ends.close()
    _die_with(keeper)
    _be_called("template")
    engine = _preload(module)
    problem = _unfit_to_fork({requests.fileno()})
    if problem is not None:
        print(f"template: {module}: {problem}", file=sys.stderr)
        return 1
    requests.send(str(os.getpid()).encode())
    order = serve(requests, keeper)
    if order is None:
        return 0
    become(order)
    status: int | None = engine.main(order.argument)
    return status or 0


def keep(ends: socket.socket) -> None:
    """Tell each child's end and wait until the agent knows; return after the last one's.

    Only then is the child waited for, so its number is nobody else's while the agent may still
    use it. The message: pid and status, negative for the signal that ended it.
    """
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            continue
        pid, status = ended.si_pid, ended.si_status
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what an instance leaves of its group
        try:
            ends.send(f"{pid} {status if ended.si_code == os.CLD_EXITED else -status}".encode())
            if not ends.recv(1):
                return
        except OSError:
            return
        os.waitpid(pid, 0)


def serve(requests: socket.socket, keeper: int) -> Order | None:
    """Have an instance at hand, and another once that was taken: forking 300 MB takes 30 ms, which
    no request waits for. Returns in the instances, with their order; in the template, with None,
    when the one at hand has ended untaken: nobody will ask any more, or something is wrong."""
    while True:
        ours, theirs = socket.socketpair()
        between = _fork()
        if between == 0:
            if _fork() != 0:
                os._exit(0)
            ours.close()
            return _wait_for_order(requests, theirs, keeper)
        theirs.close()
        with ours:
            if between is not None:
                os.waitpid(between, 0)
                with contextlib.suppress(OSError):
                    ours.send(b"\n")
            if not ours.recv(1):
                return None


def _wait_for_order(requests: socket.socket, template: socket.socket, keeper: int) -> Order:
    """An instance at hand: ends when nobody will take it."""
    os.setsid()
    _be_called("fork")
    with requests, template:
        template.recv(1)  # who forked us is dead, so the keeper is our parent
        _die_with(keeper)
        message, passed, _, _ = socket.recv_fds(
            requests, MESSAGE_BYTES_MAX, DESCRIPTORS_MAX, socket.MSG_CMSG_CLOEXEC
        )
        if not message:
            os._exit(0)
        with contextlib.suppress(OSError):
            template.send(b"\n")
    asked = json.loads(message)
    leash, output, *others = passed
    numbers = dict(zip(asked["names"], map(str, others), strict=True))
    return Order(
        leash=leash,
        output=output,
        argument=asked["argument"],
        run_dir=asked["run_dir"],
        environment=asked["environment"] | numbers,
    )


def become(order: Order) -> None:
    """Be as if we had been executed, clean of what the template was. Ends the process when the
    agent does not want it any more."""
    with socket.socket(fileno=order.leash) as leash:
        try:
            leash.send(str(os.getpid()).encode())
            wanted = leash.recv(1)
        except OSError:
            wanted = b""
    if not wanted:
        os._exit(1)
    _be_called("instance")
    os.dup2(order.output, 1)
    os.dup2(order.output, 2)
    os.close(order.output)
    os.chdir(order.run_dir)
    os.environ.clear()
    os.environ.update(order.environment)
    time.tzset()
    _default_signals()
    _fresh_chance()
    sys.argv[1:] = [order.argument]
    gc.enable()


def _preload(module: str) -> ModuleType:
    """The imports, in memory that forks share: what is frozen is not touched by a collection."""
    gc.disable()
    engine = importlib.import_module(module)
    engine.preload()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or each fork says it too
    gc.collect()
    gc.freeze()
    return engine


def _unfit_to_fork(expected: set[int]) -> str | None:
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        return f"its imports started {threads - 1} threads, which a fork would not have"
    with os.scandir("/proc/self/fd") as entries:
        descriptors = {int(entry.name) for entry in entries}
    opened = [fd for fd in descriptors - expected if fd > 2 and _is_open(fd)]
    if opened:
        names = ", ".join(
            str(Path(f"/proc/self/fd/{descriptor}").readlink()) for descriptor in opened
        )
        return f"its imports left open what forks would share: {names}"
    return None


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _fork() -> int | None:
    """None when there is no memory or no number left."""
    try:
        return os.fork()
    except OSError as error:
        print(f"template: cannot fork: {error}", file=sys.stderr, flush=True)
        return None


def _die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def _be_called(role: str) -> None:
    """What `top` and `ps -o comm` show; the command lines are all the same."""
    name = ctypes.create_string_buffer(f"sllm-{role}".encode())  # the kernel keeps 15 bytes
    _prctl(_PR_SET_NAME, ctypes.addressof(name))


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _default_signals() -> None:
    """As Python has them when it begins."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):  # those of the C library
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _fresh_chance() -> None:
    """Python's own generator sees to itself; numpy's would be the same in every fork."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        seed: Callable[[], None] = numpy_random.seed
        seed()


if __name__ == "__main__":
    sys.exit(start(sys.argv[1]))
