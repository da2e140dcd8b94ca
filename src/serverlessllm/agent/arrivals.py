"""The pipe by which an engine hears which chunks of its checkpoint have arrived."""

from __future__ import annotations

import asyncio
import os

from serverlessllm.backends.base import ALL_ARRIVED
from serverlessllm.loader.arrivals import Arriving

_WORD_BYTES = 4
_WRITE_NUMBERS = 1024
"""4 KiB, PIPE_BUF: a pipe takes so much whole or not at all, so no number is ever torn."""


class ArrivalsPipe:
    """Written when the pipe has room, never waited for: what the engine has yet to read stays in
    the loader's record. Use from one event loop only."""

    def __init__(self, arriving: Arriving) -> None:
        self._arriving = arriving
        self._sent = 0
        self._whole = False
        self._waits = False
        self.read_end, self._write_end = os.pipe()
        """The engine's, to be closed by whoever hands it over."""
        os.set_blocking(self._write_end, False)
        self._unfollow = arriving.follow(self._write)
        self._write()

    def finish(self) -> None:
        """Everything is there, and its load has succeeded."""
        self._whole = True
        self._write()

    def close(self) -> None:
        """Before `finish` it tells the engine that the load has failed. Idempotent."""
        if self._write_end < 0:
            return
        self._unfollow()
        self._hear_no_more()
        os.close(self._write_end)
        self._write_end = -1

    def _write(self) -> None:
        while self._write_end >= 0 and not self._waits:
            numbers = self._arriving.numbers[self._sent : self._sent + _WRITE_NUMBERS]
            if not numbers and not self._whole:
                return
            words = numbers or (ALL_ARRIVED,)
            try:
                os.write(
                    self._write_end,
                    b"".join(word.to_bytes(_WORD_BYTES, "little") for word in words),
                )
            except BlockingIOError:
                self._waits = True
                asyncio.get_running_loop().add_writer(self._write_end, self._writable)
            except BrokenPipeError:  # the engine has ended; its process's end is an event too
                self.close()
            else:
                self._sent += len(numbers)
                if not numbers:
                    self.close()

    def _writable(self) -> None:
        self._hear_no_more()
        self._write()

    def _hear_no_more(self) -> None:
        if self._waits:
            self._waits = False
            asyncio.get_running_loop().remove_writer(self._write_end)
