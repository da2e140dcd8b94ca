"""Files of `torch.save`: the tensors that their pickle describes, where they lie in the zip.

A tensor in row-major order is read straight from its storage; any other view is put in that order
while it is read. See `checkpoint.pickles` for how a pickle is read without running it.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock
from typing import Final

from serverlessllm.checkpoint.bounds import check_text
from serverlessllm.checkpoint.dtypes import SAFETENSORS_BITS, tensor_size_bytes
from serverlessllm.checkpoint.index import KIND_TENSORS
from serverlessllm.checkpoint.layout import Layout, RawTensor
from serverlessllm.checkpoint.pickles.archive import (
    WAY_OUT,
    Directory,
    Entry,
    check_local,
    read_directory,
)
from serverlessllm.checkpoint.pickles.interpreter import PICKLE_BYTES_MAX
from serverlessllm.checkpoint.pickles.sandbox import read_state_dict_apart
from serverlessllm.checkpoint.pickles.values import TensorView
from serverlessllm.checkpoint.sources.base import (
    LocalFile,
    MemoryFile,
    RawCheckpoint,
    RawFile,
    read_at,
)
from serverlessllm.checkpoint.sources.pick import Pick
from serverlessllm.checkpoint.sources.shards import lay_out_shards
from serverlessllm.checkpoint.sources.strided import (
    Bands,
    StridedFile,
    is_contiguous,
    overlaps,
    span,
)
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.core.units import GIB, MIB

EXPANSION_MAX: Final = 4
EXPANSION_BYTES_MAX: Final = 64 * MIB
"""Views may hold more bytes than their file: so many times as many, and as many on top."""
REREAD_MAX: Final = 64
REREAD_BYTES_MAX: Final = 1 * GIB
"""And those that are not in row-major order may lie across so many, read for a few of them."""


class StorageFile:
    """A `RawFile` that is one storage of an archive.

    The header before its bytes is checked when they are first read: of a remote file, to look at
    all of them before would fetch most of it twice.
    """

    def __init__(self, file: RawFile, entry: Entry) -> None:
        self.name = f"{file.name}:{entry.name}"
        self.size_bytes = entry.size_bytes
        self.version = f"{file.version}:{entry.offset}"
        self._file = file
        self._entry = entry
        self._checked = False
        self._lock = Lock()

    def check(self) -> None:
        """Raises CheckpointError: the archive contradicts itself about this entry."""
        with self._lock:
            if not self._checked:
                check_local(self._file, self._entry)
                self._checked = True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `RawFile.read_into`."""
        if offset < 0 or offset + len(buffer) > self.size_bytes:
            raise CheckpointError(f"{self.name}: ends at byte {self.size_bytes}")
        self.check()
        self._file.read_into(self._entry.offset + offset, buffer)


def torch_layout(raw: RawCheckpoint, chosen: Pick) -> Layout:
    """Plan the `.bin` of a source that is one or several files of `torch.save`.

    Raises:
        UnsupportedCheckpoint: a layout, a name or a kind of tensor that is not read; says which,
            where, and the way out.
        CheckpointError: a file lies, or the shard map or a side file is not valid.
    """
    bands = Bands()
    return lay_out_shards(raw, chosen, lambda file: read_tensors(file, bands), {})


def read_tensors(file: RawFile, bands: Bands) -> list[RawTensor]:
    """The tensors of one file.

    Raises: as `torch_layout`.
    """
    directory = read_directory(file)
    if _is_near(file):
        for entry in directory.entries.values():
            check_local(file, entry)
    _check_byte_order(file, directory)
    try:
        state = read_state_dict_apart(_read_entry(file, directory.pickle, PICKLE_BYTES_MAX))
    except UnsupportedCheckpoint as error:
        raise UnsupportedCheckpoint(f"{file.name}: {error.message}; {WAY_OUT}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: {error.message}") from None
    return _Placing(file, directory, bands).place(state.tensors)


def _is_near(file: RawFile) -> bool:
    """Whether to look at a few bytes here and there costs nothing."""
    return isinstance(file, LocalFile | MemoryFile)


def _check_byte_order(file: RawFile, directory: Directory) -> None:
    entry = directory.entries.get("byteorder")
    order = _read_entry(file, entry, 16) if entry else b"little"
    if order != b"little":
        raise UnsupportedCheckpoint(
            f"{file.name}: its numbers are big-endian, written on a machine of another kind: load "
            f"and save it again on a common one, or {WAY_OUT}"
        )


def _read_entry(file: RawFile, entry: Entry, size_bytes_max: int) -> bytes:
    if entry.size_bytes > size_bytes_max:
        raise CheckpointError(
            f"{file.name}: {entry.name} has {entry.size_bytes} bytes, more than {size_bytes_max}"
        )
    check_local(file, entry)
    return read_at(file, entry.offset, entry.size_bytes)


class _Placing:
    """From the views of one pickle to places in its file, each checked against its storage."""

    def __init__(self, file: RawFile, directory: Directory, bands: Bands) -> None:
        self._file = file
        self._directory = directory
        self._bands = bands
        self._storages: dict[str, StorageFile] = {}
        self._read_as: dict[tuple[str, int, int], tuple[str, tuple[int, ...]]] = {}
        self._left_bytes = EXPANSION_MAX * file.size_bytes + EXPANSION_BYTES_MAX
        self._left_reread_bytes = REREAD_MAX * file.size_bytes + REREAD_BYTES_MAX

    def place(self, views: Iterable[TensorView]) -> list[RawTensor]:
        """Raises CheckpointError: a view that does not lie in its storage, or two of one name.

        Or UnsupportedCheckpoint: a view whose elements overlap.
        """
        placed = []
        names: set[str] = set()
        for view in views:
            check_text(view.name, f"{self._file.name}: tensor name")
            if view.name in names:
                raise CheckpointError(f"{self._file.name}: tensor {view.name!r} occurs twice")
            names.add(view.name)
            try:
                placed.append(self._place(view))
            except CheckpointError as error:
                raise type(error)(
                    f"{self._file.name}: tensor {view.name!r}: {error.message}"
                ) from None
        return placed

    def _place(self, view: TensorView) -> RawTensor:
        size = tensor_size_bytes(KIND_TENSORS, view.dtype, view.shape)
        item_bytes = SAFETENSORS_BITS[view.dtype] // 8
        storage = self._storage(view)
        _check_inside(view, item_bytes)
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise CheckpointError(
                "the tensors up to this one, expanded, are far larger than their file: save them "
                "without expanding"
            )
        file: RawFile = storage
        offset = view.offset * item_bytes
        in_order = is_contiguous(view.shape, view.strides) and self._is_first(view, size)
        if size and not in_order:
            offset = 0
            file = self._strided(view, storage, item_bytes)
        return RawTensor(
            name=view.name,
            dtype=view.dtype,
            shape=view.shape,
            file=file,
            offset=offset if size else 0,
            size_bytes=size,
        )

    def _strided(self, view: TensorView, storage: StorageFile, item_bytes: int) -> StridedFile:
        if overlaps(view.shape, view.strides):
            raise UnsupportedCheckpoint(
                "its elements overlap in memory, as windows do: save it with `.contiguous()`; "
                + WAY_OUT
            )
        self._left_reread_bytes -= span(view.shape, view.strides) * item_bytes
        if self._left_reread_bytes < 0:
            raise CheckpointError(
                "the tensors up to this one are slices across one another, and would be read many "
                "times over: save them with `.contiguous()`"
            )
        return StridedFile(
            name=f"{storage.name}:{view.dtype}:{view.offset}:{view.shape}:{view.strides}",
            storage=storage,
            item_bytes=item_bytes,
            offset=view.offset,
            shape=view.shape,
            strides=view.strides,
            bands=self._bands,
        )

    def _storage(self, view: TensorView) -> StorageFile:
        entry = self._directory.storage(view.storage)
        if entry is None:
            raise CheckpointError(f"the archive has no storage {view.storage[:20]!r}")
        if entry.size_bytes != view.storage_bytes:
            raise CheckpointError(
                f"its storage has {entry.size_bytes} bytes, not {view.storage_bytes}"
            )
        return self._storages.setdefault(view.storage, StorageFile(self._file, entry))

    def _is_first(self, view: TensorView, size: int) -> bool:
        """Whether no other tensor reads the same bytes as another type or shape.

        Two names for one tensor are stored once, as aliases; these two must not be.
        """
        reading = (view.dtype, view.shape)
        where = (view.storage, view.offset * SAFETENSORS_BITS[view.dtype] // 8, size)
        return self._read_as.setdefault(where, reading) == reading


def _check_inside(view: TensorView, item_bytes: int) -> None:
    if len(view.strides) != len(view.shape):
        raise CheckpointError(f"{len(view.shape)} dimensions, but {len(view.strides)} strides")
    if 0 in view.shape:
        return
    last = view.offset + sum(
        (count - 1) * stride for count, stride in zip(view.shape, view.strides, strict=True)
    )
    if (last + 1) * item_bytes > view.storage_bytes:
        raise CheckpointError(
            f"it reaches to byte {(last + 1) * item_bytes} of a storage of {view.storage_bytes}"
        )
