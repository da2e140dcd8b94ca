"""One worker as the main process has it: its process, its channel, what is known of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable

import msgspec

from serverlessllm.orchestrator.workers.channel import Channel
from serverlessllm.orchestrator.workers.messages import (
    Alive,
    AskFigures,
    CannotStart,
    Drain,
    FiguresAre,
    FromWorker,
    Leaving,
    Listening,
    Start,
    ToWorker,
)
from serverlessllm.orchestrator.workers.publisher import Publisher, Subscription
from serverlessllm.telemetry.figures import Figures

_MODULE = "serverlessllm.orchestrator.workers"
_decoder = msgspec.msgpack.Decoder(FromWorker)


class WorkerProcess:
    """Started by `start`; `ended` is its end, whatever the cause."""

    def __init__(
        self,
        publisher: Publisher,
        on_message: Callable[[WorkerProcess, FromWorker], None],
        now_s: Callable[[], float],
    ) -> None:
        """`on_message` gets what is not about the worker itself."""
        loop = asyncio.get_running_loop()
        self._publisher = publisher
        self._on_message = on_message
        self._now_s = now_s
        self._popen: subprocess.Popen[bytes] | None = None
        self._subscription: Subscription | None = None
        self._asked: asyncio.Future[Figures] | None = None
        self.channel: Channel[FromWorker] = Channel(
            _decoder, self._heard, self._channel_ended, self._has_room
        )
        self.listening: asyncio.Future[None] = loop.create_future()
        """Done when it serves clients; `OSError` or `ValueError`: it cannot."""
        self.left: asyncio.Future[None] = loop.create_future()
        """Done when another one may take its place: it was told to leave, or has ended."""
        self.ended: asyncio.Future[int] = loop.create_future()
        """Its exit status; negative: the signal that ended it."""
        self.figures: Figures = ()
        """As it told them last."""
        self.heard_s = now_s()

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    async def start(self, start: Start, listeners: Iterable[socket.socket]) -> None:
        """Have it run, and send it `start` and the view.

        Raises:
            OSError: no descriptors or processes are left; nothing runs then.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._watch(_execute(theirs, listeners))
            except OSError:
                ours.close()
                raise
        await self.channel.open(ours)
        self.tell(start)
        self._subscription = self._publisher.subscribe(self.channel)

    def tell(self, message: ToWorker) -> None:
        self.channel.send(message)

    def drain(self) -> None:
        """Let it finish what it has and end; nobody takes its place."""
        _done(self.left)
        self.tell(Drain())

    def signal(self, number: signal.Signals) -> None:
        """Unless it has ended."""
        if self._popen is not None and not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                self._popen.send_signal(number)

    async def ask_figures(self) -> Figures:
        """All its metrics, since it began. Cancelling leaves the question to others."""
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
            self.tell(AskFigures())
        return await asyncio.shield(self._asked)

    def _watch(self, popen: subprocess.Popen[bytes]) -> None:
        """Have its end noticed at once, and its process number kept until then."""
        loop = asyncio.get_running_loop()
        self._popen = popen
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError:
            popen.kill()
            popen.wait()
            raise

        def reap() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self.ended.set_result(popen.wait())
            self.channel.abort()
            self._settle()

        loop.add_reader(pidfd, reap)

    def _heard(self, message: FromWorker) -> None:
        self.heard_s = self._now_s()
        match message:
            case Alive():
                pass
            case Listening():
                _done(self.listening)
            case CannotStart(reason=reason):
                if not self.listening.done():
                    self.listening.set_exception(ValueError(reason))
                    self.listening.exception()  # seen: it may be that nobody waits
            case Leaving():
                _done(self.left)
            case FiguresAre(figures=figures):
                self.figures = figures
                asked, self._asked = self._asked, None
                if asked is not None and not asked.done():
                    asked.set_result(figures)
            case _:
                self._on_message(self, message)

    def _has_room(self) -> None:
        if self._subscription is not None:
            self._subscription.catch_up()

    def _channel_ended(self) -> None:
        """A worker without its channel knows nothing of the cluster any more."""
        if self._subscription is not None:
            self._publisher.unsubscribe(self._subscription)
        if not self.left.done():
            self.signal(signal.SIGKILL)

    def _settle(self) -> None:
        """It has ended: nobody waits for it any longer."""
        _done(self.left)
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(self.figures)
        if not self.listening.done():
            self.listening.cancel()


def _execute(channel: socket.socket, listeners: Iterable[socket.socket]) -> subprocess.Popen[bytes]:
    """In the loop's own thread: the signal at the parent's death is for the death of the thread
    that started the child."""
    return subprocess.Popen(
        (sys.executable, "-P", "-m", _MODULE, str(channel.fileno()), str(os.getpid())),
        stdin=subprocess.DEVNULL,
        stdout=2,  # the main process's own stdout is for what it announces
        pass_fds=(channel.fileno(), *(each.fileno() for each in listeners)),
        start_new_session=True,  # Ctrl-C is for the main process
    )


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
