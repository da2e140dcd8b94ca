"""Devices of plain memory, as late as an accelerator may be: a copy is carried out only when
somebody waits for it, so whoever uses its source again too early gets wrong bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from serverlessllm.core.errors import OutOfSpace
from serverlessllm.loader.tiers.staging import Staging


class LateAccelerator:
    """An `Accelerator`. `totals`: bytes of each device."""

    def __init__(self, totals: Mapping[int, int]) -> None:
        self.totals = totals
        self.ring: Staging | None = None
        self.allocated: list[LateMemory] = []
        """Not freed yet."""
        self.gate = threading.Event()
        """While it is not set, no copy is carried out."""
        self.gate.set()
        self.waited = threading.Event()
        """Somebody waits for a copy."""

    def start(self, ring: Staging) -> None:
        self.ring = ring

    def free_bytes(self) -> Mapping[int, int]:
        taken = dict.fromkeys(self.totals, 0)
        for memory in self.allocated:
            taken[memory.device] += len(memory.data)
        return {device: total - taken[device] for device, total in self.totals.items()}

    def total_bytes(self) -> Mapping[int, int]:
        return self.totals

    def allocate(self, device: int, size_bytes: int) -> LateMemory:
        if size_bytes > self.free_bytes()[device]:
            raise OutOfSpace(f"device {device} is full")
        memory = LateMemory(self, device, size_bytes)
        self.allocated.append(memory)
        return memory

    def close(self) -> None:
        assert not self.allocated
        self.ring = None


class LateMemory:
    """An `Allocation`. `data`: what has really been copied."""

    def __init__(self, accelerator: LateAccelerator, device: int, size_bytes: int) -> None:
        self.device = device
        self.data = bytearray(b"\xee" * size_bytes)
        self._accelerator = accelerator
        self._asked: list[Callable[[], None]] = []
        self._done = 0
        self._turn = threading.Lock()

    def copy(self, view: memoryview, at: int) -> LateEvent:
        def carry_out() -> None:
            self.data[at : at + len(view)] = view

        with self._turn:
            self._asked.append(carry_out)
            return LateEvent(self, len(self._asked))

    def mark(self) -> LateEvent:
        with self._turn:
            return LateEvent(self, len(self._asked))

    def reach(self, point: int) -> None:
        """Carry out the copies up to a point, in order."""
        if point <= self._done:
            return
        self._accelerator.waited.set()
        self._accelerator.gate.wait()
        with self._turn:
            while self._done < point:
                self._asked[self._done]()
                self._done += 1

    def has_reached(self, point: int) -> bool:
        return self._done >= point

    def share(self) -> bytes:
        return b"device %d" % self.device

    def free(self) -> None:
        assert self._done == len(self._asked), "freed while copies were under way"
        self._accelerator.allocated.remove(self)


class LateEvent:
    """An `Event`. A stream that it holds is a list: of the events that it waits for."""

    def __init__(self, memory: LateMemory, point: int) -> None:
        self._memory = memory
        self._point = point

    @property
    def is_over(self) -> bool:
        return self._memory.has_reached(self._point)

    def wait(self) -> None:
        self._memory.reach(self._point)

    def hold(self, stream: object) -> None:
        assert isinstance(stream, list)
        stream.append(self)
