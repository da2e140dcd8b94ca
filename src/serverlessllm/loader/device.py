"""Where weights end: on a CPU in DRAM itself; else in the memory of NVIDIA GPUs, through torch.

Nothing of torch is imported before a `Cuda` is made.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from serverlessllm.core.agentapi import HopTiming
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import LoadFailed, OutOfSpace
from serverlessllm.core.units import format_size
from serverlessllm.loader.accelerator import Accelerator, DeviceUnavailable
from serverlessllm.loader.plan import hop_name
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.speeds import Speeds
from serverlessllm.loader.tiers.staging import Staging
from serverlessllm.loader.weights import DeviceHandle, PartHandle

_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every device's context."""
_IPC_LAZY_PEER_ACCESS = 1
"""The only flag of cuIpcOpenMemHandle."""
_CPU_ANYWAY = 'or set loader.device = "cpu"'


def attach(speeds: Speeds) -> HopTiming:
    """The last hop of a load for a CPU: an engine maps the `.bin` where it lies, so there are no
    bytes and no time."""
    hop = hop_name(CacheLevel.DRAM, CacheLevel.DEVICE)
    return HopTiming(hop=hop, limit_bytes_s=speeds.limit(hop))


def open_accelerator(settings: LoaderSettings) -> Accelerator | None:
    """What `loader.device` asks for; None for a CPU.

    Raises:
        DeviceUnavailable: there is no such device, or no library or driver for it.
    """
    return Cuda(settings.device_numbers) if settings.device == "cuda" else None


def import_torch() -> Any:
    """Torch, when it can use a GPU.

    Raises:
        DeviceUnavailable: it cannot, or is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise DeviceUnavailable(
            "GPUs need torch, which is not installed: pip install 'serverlessllm[torch]', "
            f"{_CPU_ANYWAY}"
        ) from error
    if not torch.cuda.is_available():
        build = f"torch {torch.__version__}"
        raise DeviceUnavailable(
            f"{build} finds no usable GPU: check the driver (`nvidia-smi`) and that this is a CUDA "
            f"build of torch, {_CPU_ANYWAY}"
        )
    return torch


class Cuda:
    """NVIDIA GPUs; an `Accelerator`. `numbers`: as CUDA numbers them, None for all."""

    def __init__(self, numbers: tuple[int, ...] | None) -> None:
        self._torch = import_torch()
        count = self._torch.cuda.device_count()
        self._numbers = tuple(range(count)) if numbers is None else numbers
        if missing := [number for number in self._numbers if not 0 <= number < count]:
            raise DeviceUnavailable(
                f"loader.device_numbers names GPU {missing[0]}, but this machine has {count}: "
                "they are numbered from 0"
            )
        self._streams: dict[int, Any] = {}
        self._ring: Staging | None = None

    def start(self, ring: Staging) -> None:
        cuda = self._torch.cuda
        with _driver_errors():
            for number in self._numbers:
                self._streams[number] = cuda.Stream(device=number)
            status = cuda.cudart().cudaHostRegister(
                ring.address, len(ring.memory), _REGISTER_PORTABLE
            )
        if int(status):
            raise DeviceUnavailable(
                f"the GPU's driver will not lock {format_size(len(ring.memory))} of memory (CUDA "
                f"error {int(status)}): raise the limit of locked memory, or lower "
                f"loader.copy_threads, {_CPU_ANYWAY}"
            )
        self._ring = ring

    def free_bytes(self) -> Mapping[int, int]:
        return {number: self._torch.cuda.mem_get_info(number)[0] for number in self._numbers}

    def total_bytes(self) -> Mapping[int, int]:
        return {number: self._torch.cuda.mem_get_info(number)[1] for number in self._numbers}

    def allocate(self, device: int, size_bytes: int) -> CudaMemory:
        torch, stream = self._torch, self._streams[device]
        try:
            with torch.cuda.stream(stream):
                memory = torch.empty(size_bytes, dtype=torch.uint8, device=f"cuda:{device}")
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfSpace(
                f"GPU {device} has no {format_size(size_bytes)} free in one piece: unload a model, "
                "or lower loader.device_budget_bytes"
            ) from error
        return CudaMemory(torch, memory, stream)

    def close(self) -> None:
        if self._ring is not None:
            self._torch.cuda.cudart().cudaHostUnregister(self._ring.address)
            self._ring = None


class CudaMemory:
    """One allocation of one GPU, and the stream that fills it; an `Allocation`."""

    def __init__(self, torch: Any, memory: Any, stream: Any) -> None:
        self._torch = torch
        self._stream = stream
        self.memory = memory
        """A tensor of bytes; a checkpoint's tensors are views of it."""

    def copy(self, view: memoryview, at: int) -> CudaEvent:
        torch = self._torch
        with _driver_errors(), torch.cuda.stream(self._stream):
            source = torch.frombuffer(view, dtype=torch.uint8)
            self.memory[at : at + len(view)].copy_(source, non_blocking=True)
            return self.mark()

    def mark(self) -> CudaEvent:
        event = self._torch.cuda.Event(blocking=True)  # a spinning wait would take a core
        event.record(self._stream)
        return CudaEvent(event)

    def share(self) -> bytes:
        """Raises LoadFailed: the driver cannot share it (torch's expandable segments)."""
        return msgspec.msgpack.encode(export(self._torch, self.memory))

    def free(self) -> None:
        self.memory = None
        self._torch.cuda.empty_cache()


class CudaEvent:
    """A point in a stream; an `Event`."""

    __slots__ = ("_event",)

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        with _driver_errors():
            self._event.synchronize()

    def hold(self, stream: object) -> None:
        """`stream`: a `torch.cuda.Stream`."""
        self._event.wait(stream)


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """Where an allocation lies, in words that any process of the machine understands."""

    gpu: str
    """UUID: processes may number GPUs differently."""
    memory: bytes
    """The driver's handle of the allocation that it lies in."""
    offset: int
    """In that allocation."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


def export(torch: Any, memory: Any) -> Exported:
    """Have the driver name the allocation that a tensor lies in.

    The driver's own calls, and not torch's way of sharing: there a consumer that is killed keeps
    the memory from being freed for as long as the producer lives.
    """
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _IpcHandle()
    address = memory.data_ptr()
    with _current(torch, memory.device.index) as driver:
        _check(
            driver.cuMemGetAddressRange_v2(
                ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
            )
        )
        _check(driver.cuIpcGetMemHandle(ctypes.byref(handle), base))
    return Exported(
        gpu=_uuid(torch, memory.device.index), memory=bytes(handle), offset=address - base.value
    )


class Opened:
    """Weights of another process of this machine, as tensors of bytes, one a part.

    Close it only when nothing computes with them or with views of them any more, and before the
    process that holds them gives them up.
    """

    def __init__(self, handle: DeviceHandle) -> None:
        """Raises DeviceUnavailable: this process cannot use the GPU. LoadFailed: the memory is
        gone, or belongs to this very process."""
        self._torch = import_torch()
        self._open: list[tuple[int, int]] = []
        self.parts: list[tuple[PartHandle, Any]] = []
        try:
            for part in handle.parts:
                self.parts.append((part, self._part(part)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        self.parts = []
        while self._open:
            device, address = self._open.pop()
            with _current(self._torch, device) as driver:
                _check(driver.cuIpcCloseMemHandle(ctypes.c_uint64(address)))

    def _part(self, part: PartHandle) -> Any:
        torch = self._torch
        exported = msgspec.msgpack.decode(part.memory, type=Exported)
        devices = range(torch.cuda.device_count())
        found = [number for number in devices if _uuid(torch, number) == exported.gpu]
        if not found:
            raise DeviceUnavailable(
                "the weights are on a GPU that this process does not see: check "
                "CUDA_VISIBLE_DEVICES"
            )
        address = ctypes.c_uint64()
        handle = _IpcHandle.from_buffer_copy(exported.memory)
        with _current(torch, found[0]) as driver:
            flags = ctypes.c_uint(_IPC_LAZY_PEER_ACCESS)
            _check(driver.cuIpcOpenMemHandle_v2(ctypes.byref(address), handle, flags))
        self._open.append((found[0], address.value))
        memory = _Memory(address.value + exported.offset, part.size_bytes)
        return torch.as_tensor(memory, device=f"cuda:{found[0]}")


class _Memory:
    """Device memory as the CUDA array interface describes it (version 3)."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


@contextlib.contextmanager
def _current(torch: Any, device: int) -> Iterator[ctypes.CDLL]:
    """The driver, with torch's context of a device current in this thread."""
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)  # makes it current where this thread never used it
        yield ctypes.CDLL("libcuda.so.1")


def _uuid(torch: Any, device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _check(status: int) -> None:
    if status:
        raise LoadFailed(
            f"the GPU's memory cannot be shared between processes (CUDA driver error {status}): "
            "unset PYTORCH_CUDA_ALLOC_CONF if it turns expandable segments on"
        )


@contextlib.contextmanager
def _driver_errors() -> Iterator[None]:
    """What torch says of CUDA (all its errors are of this class), in the error contract's words."""
    try:
        yield
    except RuntimeError as error:
        raise LoadFailed("a GPU failed: see the agent's log and `nvidia-smi`") from error
