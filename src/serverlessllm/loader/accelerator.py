"""The seam to accelerators: what the device tier needs of them, and nothing of any library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from serverlessllm.core.errors import LoadFailed
from serverlessllm.loader.tiers.staging import Staging


class DeviceUnavailable(LoadFailed):
    """The accelerator cannot be used: says what is missing, and the cure."""

    code = "device_unavailable"
    permanent = True


class Event(Protocol):
    """A point in a device's work: everything that was asked of it before."""

    def wait(self) -> None:
        """Block until the device has got there."""

    def hold(self, stream: object) -> None:
        """Let `stream`, an engine's own queue of work on that device, wait for it; not us."""


class Allocation(Protocol):
    """Memory of one device. Copies into it are carried out in the order they were asked for."""

    def copy(self, view: memoryview, at: int) -> Event:
        """Ask for a copy of all of `view`, which must stay as it is until the event, to byte `at`
        on. Returns at once."""

    def mark(self) -> Event:
        """The point after all copies that were asked for."""

    def share(self) -> bytes:
        """What another process of this machine opens the memory by; see `DeviceHandle`."""

    def free(self) -> None:
        """Give the memory back to the device. No copy may be under way."""


class Accelerator(Protocol):
    """The devices of this node. Everything here may block; call it in a thread."""

    def start(self, ring: Staging) -> None:
        """Lock the ring's pages for the devices: once, since that costs more than to copy them."""

    def free_bytes(self) -> Mapping[int, int]:
        """By device: what could be allocated now."""

    def total_bytes(self) -> Mapping[int, int]:
        """By device: its whole memory."""

    def allocate(self, device: int, size_bytes: int) -> Allocation:
        """Raises OutOfSpace: the device has no room for it."""

    def close(self) -> None:
        """Unlock the ring. Nothing may be allocated any more. Idempotent."""
