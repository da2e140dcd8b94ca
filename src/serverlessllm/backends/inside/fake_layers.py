"""The fake engine's layers: the chunks of its checkpoint, each used once it has arrived."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec
from crc32c import crc32c

from serverlessllm.backends.base import ALL_ARRIVED, ARRIVALS_FD, WEIGHTS_FD
from serverlessllm.checkpoint.index import decode_index

_WORD_BYTES = 4
_READ_BYTES = 4096
_LOAD_FAILED_STATUS = 4


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent has told of the checkpoint: the answer of `GET /layers`."""

    arrived: tuple[int, ...]
    """Chunks by number, in the order in which they were told of."""
    whole: bool
    """Whether everything is there; from the beginning, with nothing `arrived`."""


class Layers:
    """A checkpoint that may still be arriving. Use from one event loop only."""

    def __init__(self, index_path: Path) -> None:
        """Takes the descriptors that the agent left in the environment."""
        self._index = decode_index(index_path.read_bytes())
        self._weights = int(os.environ.pop(WEIGHTS_FD))
        self._arrivals = int(os.environ.pop(ARRIVALS_FD, "-1"))
        self._rest = b""
        self._turn = asyncio.Event()
        self._whole = self._arrivals < 0
        self._arrived: list[int] = []
        if not self._whole:
            os.set_blocking(self._arrivals, False)
            asyncio.get_running_loop().add_reader(self._arrivals, self._read)

    async def token(self, number: int) -> str:
        """What the layer of this number says, once it is there."""
        chunk = number % len(self._index.chunks)
        while not self._whole and chunk not in self._arrived:
            await self._turn.wait()
        offset, size = self._index.chunk_range(chunk)
        return f"{crc32c(os.pread(self._weights, size, offset)):08x}"

    def told(self) -> Told:
        """So far."""
        return Told(arrived=tuple(self._arrived), whole=self._whole)

    def _read(self) -> None:
        data = os.read(self._arrivals, _READ_BYTES)
        if not data:
            sys.stderr.write("fake: not all of the checkpoint came\n")
            sys.stderr.flush()
            os._exit(_LOAD_FAILED_STATUS)
        data = self._rest + data
        ends = range(_WORD_BYTES, len(data) + 1, _WORD_BYTES)
        for word in (int.from_bytes(data[end - _WORD_BYTES : end], "little") for end in ends):
            if word == ALL_ARRIVED:
                self._whole = True
                asyncio.get_running_loop().remove_reader(self._arrivals)
                os.close(self._arrivals)
            else:
                self._arrived.append(word)
        self._rest = data[len(ends) * _WORD_BYTES :]
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()
