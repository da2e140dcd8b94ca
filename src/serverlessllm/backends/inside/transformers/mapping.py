"""The checkpoint's file in this process's address space: side files as bytes, tensors as views."""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path

import torch

from serverlessllm.backends.base import WEIGHTS_FD
from serverlessllm.checkpoint.index import Index, Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""safetensors' names, in torch's terms."""


class Mapping:
    """The `.bin`, read-only and shared with every process that maps it. Nothing is copied: a
    tensor is a view, and a page that has not arrived yet reads as zeros."""

    def __init__(self, index: Index, descriptor: int) -> None:
        """Maps what `descriptor` names, and closes it."""
        self._index = index
        try:
            self._map = mmap.mmap(descriptor, index.size_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written to is the point
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._start = self._bytes.data_ptr()

    @staticmethod
    def of_environment(index: Index, path: Path) -> Mapping:
        """The descriptor that the agent has handed down, else `path`."""
        handed = os.environ.pop(WEIGHTS_FD, None)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if handed is None else int(handed)
        return Mapping(index, descriptor)

    def side_files(self) -> dict[str, bytes]:
        """By name."""
        return {
            file.name: self._map[file.offset : file.offset + file.size_bytes]
            for file in self._index.side_files
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """A view of each tensor that has bytes of its own, by its name in the checkpoint."""
        return {tensor.name: self._view(tensor) for tensor in self._index.tensors}

    def span(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Offset and size of the bytes of the `.bin` that it is a view of; None for any other."""
        if tensor.device.type != "cpu":
            return None
        offset = tensor.data_ptr() - self._start
        return (offset, tensor.nbytes) if 0 <= offset < self._index.size_bytes else None

    def _view(self, tensor: Tensor) -> torch.Tensor:
        dtype = DTYPES[tensor.dtype]
        if not tensor.size_bytes:
            return torch.empty(tensor.shape, dtype=dtype)
        raw = self._bytes[tensor.offset : tensor.offset + tensor.size_bytes]
        return raw.view(dtype).view(tensor.shape)
