"""A checkpoint's bytes in the memory of one or several devices."""

from __future__ import annotations

import threading

import msgspec

from serverlessllm.checkpoint.index import Index
from serverlessllm.core.errors import LoadFailed
from serverlessllm.loader.accelerator import Allocation, Event
from serverlessllm.loader.plan import Span


class PartHandle(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a checkpoint, for another process of this machine."""

    offset: int
    """In the `.bin`."""
    size_bytes: int
    memory: bytes
    """What the device's own library made of the allocation."""


class DeviceHandle(msgspec.Struct, frozen=True, kw_only=True):
    """Weights that another process of this machine can open, as long as they are held here."""

    parts: tuple[PartHandle, ...]


class Weights:
    """One allocation a device, filled in any order; a tensor is a view of it by its offset.

    Filled by threads of the loader, followed by threads of an engine in the same process.
    """

    def __init__(self, index: Index, parts: tuple[tuple[Span, Allocation], ...]) -> None:
        self.index = index
        self.parts = parts
        self._there: dict[int, tuple[Event, ...]] = {}
        self._ended = False
        self._changed = threading.Condition()

    def write(self, view: memoryview, offset: int) -> Event:
        """Ask for a copy of all of `view` to where `offset` of the `.bin` belongs."""
        end = offset + len(view)
        events = []
        for span, allocation in self.parts:
            start, stop = max(offset, span.offset), min(end, span.end)
            if start < stop:
                part = view[start - offset : stop - offset]
                events.append(allocation.copy(part, start - span.offset))
        return events[0] if len(events) == 1 else All(tuple(events))

    def arrived(self, number: int) -> None:
        """Chunk `number` has been checked, and asked for to its last byte."""
        offset, size = self.index.chunk_range(number)
        events = tuple(
            allocation.mark()
            for span, allocation in self.parts
            if span.offset < offset + size and offset < span.end
        )
        with self._changed:
            self._there[number] = events
            self._changed.notify_all()

    def end(self) -> None:
        """No chunk will arrive any more: all are there, or the load failed. Idempotent."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def follow(self, offset: int, size_bytes: int, stream: object) -> None:
        """Let an engine's `stream` wait until these bytes (a layer's, say) are there. Blocks only
        until they are on their way.

        Raises:
            LoadFailed: they never will be.
        """
        grid = self.index.chunk_bytes
        for number in range(offset // grid, -(-(offset + size_bytes) // grid)):
            with self._changed:
                self._changed.wait_for(lambda n=number: n in self._there or self._ended)  # type: ignore[misc] # mypy cannot type a default of a lambda
                events = self._there.get(number)
            if events is None:
                raise LoadFailed("the weights did not all reach the device: load the model again")
            for event in events:
                event.hold(stream)

    def handle(self) -> DeviceHandle:
        """For another process; valid until the weights are dropped from the device."""
        return DeviceHandle(
            parts=tuple(
                PartHandle(offset=span.offset, size_bytes=span.size_bytes, memory=memory.share())
                for span, memory in self.parts
            )
        )

    def settle(self) -> None:
        """Wait for every copy that was asked for. Blocks."""
        for _, allocation in self.parts:
            allocation.mark().wait()

    def free(self) -> None:
        """Give the memory back, once nothing is copied into it any more. Blocks."""
        self.end()
        self.settle()
        for _, allocation in self.parts:
            allocation.free()


class All:
    """Several events as one."""

    __slots__ = ("_events",)

    def __init__(self, events: tuple[Event, ...]) -> None:
        self._events = events

    def wait(self) -> None:
        for event in self._events:
            event.wait()

    def hold(self, stream: object) -> None:
        for event in self._events:
            event.hold(stream)
