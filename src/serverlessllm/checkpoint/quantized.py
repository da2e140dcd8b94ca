"""What quantising makes of a tensor, and the safetensors folder that it is written to.

Pure of any engine: `backends/inside/quantize` has the arithmetic. The names and shapes are those
of the `compressed-tensors` format, so that other engines read such a folder too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from serverlessllm.checkpoint.dtypes import tensor_size_bytes
from serverlessllm.checkpoint.index import KIND_TENSORS, Index, Tensor
from serverlessllm.core.errors import CheckpointError, InvalidRequest, OutOfSpace
from serverlessllm.core.units import GIB, MIB, format_size

SHARD_BYTES = 1 * GIB
FLOATS = frozenset({"BF16", "F16", "F32"})
"""Element types that can be quantised."""

_GROUP_SIZES = (16, 32, 64, 128, 256)
_DEFAULT_GROUP_SIZE = {"int8": None, "int4": 32}
_WORD_WEIGHTS = 8
"""4-bit weights in one 32-bit word."""
_PACKED, _SCALE = "_packed", "_scale"
_KERNEL_GROUPS = frozenset({32, 64, 128, 256})
_KERNEL_DTYPE = "BF16"
"""What the kernels of `backends/inside/quantize/running.py` multiply in."""
_SPARE_BYTES = 16 * MIB


class Scheme(msgspec.Struct, frozen=True, kw_only=True):
    """How weights are rounded: to integers, with a scale for each group or row."""

    name: str
    """`int8` or `int4`."""
    group_size: int | None
    """Weights of a row that share a scale; None: the whole row."""

    @property
    def bits(self) -> int:
        return int(self.name.removeprefix("int"))

    @property
    def symmetric(self) -> bool:
        """Whether zero is the middle. At 4 bits a zero point for each group costs 1/8 bit a weight
        of the default size, and takes a sixth of the error away; at 8 bits there is no need."""
        return self.bits != 4


def scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme of this name; a `group_size` of None is its default.

    Raises:
        InvalidRequest: no such scheme, or a group of another size.
    """
    if name not in _DEFAULT_GROUP_SIZE:
        known = ", ".join(_DEFAULT_GROUP_SIZE)
        raise InvalidRequest(f"unknown scheme {name[:40]!r}: one of {known}", param="quantize")
    if group_size is None:
        return Scheme(name=name, group_size=_DEFAULT_GROUP_SIZE[name])
    if group_size not in _GROUP_SIZES:
        sizes = ", ".join(map(str, _GROUP_SIZES))
        raise InvalidRequest(
            f"a group of {group_size} weights is not supported: one of {sizes}",
            param="group_size",
        )
    return Scheme(name=name, group_size=group_size)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of the folder to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return tensor_size_bytes(KIND_TENSORS, self.dtype, self.shape)


class QuantizedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the place of one weight."""

    weight: Part
    """`int8`: I8 of the weight's own name and shape. `int4`: `…weight_packed`, I32 words of eight
    weights each along the row, the first in the lowest bits, all with 8 added."""
    scale: Part
    """`…weight_scale`: of the weight's own element type, one column a group."""
    zero: Part | None = None
    """`…weight_zero_point` of a packed weight: I32 words of eight zero points each, packed as the
    weights are, but along the column."""
    shape: Part | None = None
    """`…weight_shape` of a packed weight: two I64."""

    @property
    def parts(self) -> tuple[Part, ...]:
        found = (self.weight, self.scale, self.zero, self.shape)
        return tuple(part for part in found if part is not None)


def quantized(tensor: Tensor, scheme: Scheme) -> QuantizedTensor:
    """What a weight becomes.

    Raises:
        CheckpointError: it is no matrix of floats, or its rows do not divide into groups; names
            the sizes that would.
    """
    if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
        shape = "x".join(map(str, tensor.shape)) or "a scalar"
        raise CheckpointError(
            f"tensor {tensor.name!r} ({tensor.dtype}, {shape}) cannot be quantised: it is no "
            "matrix of BF16, F16 or F32"
        )
    rows, columns = tensor.shape
    grain = max(scheme.group_size or 1, _WORD_WEIGHTS if scheme.bits == 4 else 1)
    if not rows or not columns or columns % grain:
        fitting = [str(size) for size in _GROUP_SIZES if columns and columns % size == 0]
        cure = f"--group-size {' or '.join(fitting)} would" if fitting else "no group size does"
        raise CheckpointError(
            f"tensor {tensor.name!r} has rows of {columns} weights, which do not divide into "
            f"groups of {grain}: {cure}" + ("; int8 can take whole rows" if not fitting else "")
        )
    groups = columns // scheme.group_size if scheme.group_size else 1
    name = tensor.name
    scale = Part(name=name + _SCALE, dtype=tensor.dtype, shape=(rows, groups))
    if scheme.bits == 8:
        return QuantizedTensor(
            weight=Part(name=name, dtype="I8", shape=(rows, columns)), scale=scale
        )
    words, tall = columns // _WORD_WEIGHTS, -(-rows // _WORD_WEIGHTS)
    return QuantizedTensor(
        weight=Part(name=name + _PACKED, dtype="I32", shape=(rows, words)),
        scale=scale,
        zero=Part(name=f"{name}_zero_point", dtype="I32", shape=(tall, groups)),
        shape=Part(name=f"{name}_shape", dtype="I64", shape=(2,)),
    )


def has_kernel(bits: int, rows: int, columns: int, group_size: int | None) -> bool:
    """Whether torch has a CPU kernel that multiplies BF16 with such weights as they are.

    Its 8-bit one reads past the end of rows that its vectors do not divide, so it is asked for
    what they do.
    """
    if bits == 8:
        return group_size is None and columns % 64 == 0
    return group_size in _KERNEL_GROUPS and rows % 16 == 0


def private_bytes(index: Index) -> int:
    """What an instance on a CPU holds of its own beside a quantised checkpoint: nothing where a
    kernel reads the weights as they lie, the kernel's own order of 4-bit ones, and the restored
    weights where there is no kernel."""
    done = index.quantization
    if done is None:
        return 0
    tensors = {tensor.name: tensor for tensor in index.tensors}
    total = 0
    for scale in index.tensors:
        name = scale.name.removesuffix(_SCALE)
        stored = tensors.get(name + _PACKED) or tensors.get(name)
        if name == scale.name or stored is None or len(stored.shape) != 2:
            continue
        packed = stored.name != name
        rows, columns = stored.shape[0], stored.shape[1] * (_WORD_WEIGHTS if packed else 1)
        fits = has_kernel(4 if packed else 8, rows, columns, done.group_size)
        if scale.dtype != _KERNEL_DTYPE or not fits:
            total += tensor_size_bytes(KIND_TENSORS, scale.dtype, (rows, columns))
        elif packed:
            total += stored.size_bytes + 2 * scale.size_bytes
    return total


class SafetensorsFolder:
    """Safetensors shards whose tensors are all known before the first byte is.

    `write` may be called in any order; what was never written is zeros.

    Raises:
        OutOfSpace: the disk has no room for all of it; nothing is left behind.
    """

    def __init__(self, folder: Path, parts: Iterable[Part], aliases: Mapping[str, str]) -> None:
        self._notes = {"format": "pt", **aliases}  # as safetensors notes a tied tensor's name
        self._fds: list[int] = []
        self._where: dict[str, tuple[int, int]] = {}
        shards = _shards(parts)
        self.size_bytes = sum(part.size_bytes for shard in shards for part in shard)
        disk = os.statvfs(folder)
        if self.size_bytes + _SPARE_BYTES > disk.f_bavail * disk.f_frsize:
            raise OutOfSpace(
                f"the quantised weights need {format_size(self.size_bytes)} beside the "
                "destination for a while, and its disk has less free"
            )
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards):
            name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            weight_map |= {part.name: name for part in shard}
            self._fds.append(self._open(folder / name, shard, number))
        shard_map = {"metadata": {"total_size": self.size_bytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_bytes(msgspec.json.encode(shard_map))

    def _open(self, path: Path, shard: list[Part], number: int) -> int:
        header: dict[str, object] = {"__metadata__": self._notes}
        end = 0
        for part in shard:
            start, end = end, end + part.size_bytes
            header[part.name] = {
                "dtype": part.dtype,
                "shape": part.shape,
                "data_offsets": (start, end),
            }
            self._where[part.name] = (number, start)
        text = msgspec.json.encode(header)
        text += b" " * (-len(text) % 8)  # tensors begin where any element type is aligned
        begin = 8 + len(text)
        for part in shard:
            self._where[part.name] = (number, begin + self._where[part.name][1])
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        _write(fd, 0, memoryview(len(text).to_bytes(8, "little") + text))
        os.ftruncate(fd, begin + end)
        return fd

    def write(self, name: str, offset: int, view: memoryview) -> None:
        """Put bytes at `offset` of tensor `name`."""
        number, start = self._where[name]
        _write(self._fds[number], start + offset, view)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in self._fds:
            with suppress(OSError):
                os.close(fd)


def _shards(parts: Iterable[Part]) -> list[list[Part]]:
    """In order, a shard at most `SHARD_BYTES` unless one tensor alone is longer."""
    shards: list[list[Part]] = []
    held = 0
    for part in parts:
        if not shards or held + part.size_bytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(part)
        held += part.size_bytes
    return shards


def _write(fd: int, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
