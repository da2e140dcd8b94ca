"""What a pickle of tensors is made of here: descriptions, never the things themselves.

This package's child process starts in milliseconds because it imports nothing from outside of the
standard library: hence plain classes where the rest of the project has msgspec's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

Value = object
"""`None`, a bool, int, float, str, bytes, tuple, list or dict, or one of the classes below."""

NUMBER_MAX: Final = (1 << 63) - 1
STORAGE_KEY_CHARS_MAX: Final = 64


class Global:
    """A name that a pickle refers to. Nothing is imported for it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Storage:
    """The bytes of one or more tensors: entry `data/<key>` of the archive."""

    __slots__ = ("dtype", "key", "size_bytes")

    def __init__(self, key: str, dtype: str | None, size_bytes: int) -> None:
        self.key = key
        self.dtype = dtype
        """safetensors' name of its elements' type; None for untyped bytes."""
        self.size_bytes = size_bytes


class Tensor:
    """A view of a storage; offset and strides in elements."""

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        dtype: str,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.strides = strides


class Opaque:
    """Something harmless that says nothing of tensors: a device, a layout."""

    __slots__ = ()


class TensorView(NamedTuple):
    """A tensor of a state dict: `shape` and `strides` over the bytes of a storage.

    `offset` and `strides` count elements of `dtype`. Nothing here has been checked against the
    archive.
    """

    name: str
    dtype: str
    """safetensors' name."""
    storage: str
    """The key of its storage."""
    storage_bytes: int
    """How long the pickle says that the storage is."""
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class StateDict(NamedTuple):
    """The tensors of a pickle, in its order, and the keys that they were wrapped in."""

    tensors: tuple[TensorView, ...]
    wrapped_in: tuple[str, ...]
