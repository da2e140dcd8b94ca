"""Raw weights, wherever they are: named files that can be read at an offset.

A local folder is given by an operator, but what is in it comes from strangers: files are opened
without following symlinks, except a link that stays in the folder, or that leads from a Hugging
Face snapshot (`…/snapshots/<revision>/`) into the `blobs/` beside it. A single file that the
operator names may be a link to anywhere.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgspec
from blake3 import blake3

from serverlessllm.core.errors import CheckpointError, SourceUnavailable

FILES_MAX = 10_000


class RawFile(Protocol):
    """One file of a source. Blocking and thread-safe."""

    @property
    def name(self) -> str:
        """Its name in the source: no folder."""
        ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def version(self) -> str:
        """Another text whenever the bytes may be others (an ETag, a digest, an mtime).

        Decides whether an interrupted conversion may resume; never part of a checkpoint.
        """
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`.

        Raises:
            SourceUnavailable: they cannot be had now.
            CheckpointError: the file is not what it was when it was opened.
        """
        ...


class RawCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Raw weights of one revision of one model.

    `source` and `revision` end up in the `.idx`: no local path, nothing that differs between two
    runs on the same input.
    """

    files: Mapping[str, RawFile]
    model: str
    """Name without revision."""
    source: str
    """Such as `hf://org/name`, or `file:name` for what was a local path."""
    revision: str
    license: str | None = None


class MemoryFile(msgspec.Struct, frozen=True):
    """A `RawFile` made of bytes."""

    name: str
    data: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @property
    def version(self) -> str:
        return blake3(self.data).hexdigest()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]


def read_all(file: RawFile, size_bytes_max: int) -> bytes:
    """A whole small file.

    Raises:
        CheckpointError: it is longer than `size_bytes_max`.
    """
    if file.size_bytes > size_bytes_max:
        raise CheckpointError(
            f"{file.name}: {file.size_bytes} bytes are more than {size_bytes_max}"
        )
    return read_at(file, 0, file.size_bytes)


def read_at(file: RawFile, offset: int, size_bytes: int) -> bytes:
    """A few bytes of a file; the caller has bounded `size_bytes`."""
    data = bytearray(size_bytes)
    file.read_into(offset, memoryview(data))
    return bytes(data)


class LocalFile(msgspec.Struct, frozen=True):
    """A `RawFile` on a local disk: opened for each read (10 µs), so nothing has to be closed."""

    name: str
    path: Path
    size_bytes: int
    version: str

    @classmethod
    def at(cls, name: str, path: Path) -> LocalFile:
        """Look at a file whose links have been resolved.

        Raises:
            CheckpointError: not a regular file.
            SourceUnavailable: it cannot be opened.
        """
        fd = _open(name, path)
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        return cls(name, path, status.st_size, _version(status))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        fd = _open(self.name, self.path)
        try:
            if _version(os.fstat(fd)) != self.version:
                raise CheckpointError(f"{self.name}: changed while it was read")
            done = 0
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{self.name}: ends at byte {offset + done}")
                done += count
        except OSError as error:
            raise SourceUnavailable(f"{self.name}: {error.strerror}") from error
        finally:
            os.close(fd)


def _open(name: str, path: Path) -> int:
    """O_NONBLOCK: a FIFO must not hang us before we see what it is."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SourceUnavailable(f"{name}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{name}: not a regular file")
    return fd


def _version(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def open_folder(
    path: Path,
    *,
    model: str,
    source: str | None = None,
    revision: str = "local",
    license: str | None = None,  # noqa: A002 - the field's name
) -> RawCheckpoint:
    """The files at the top of a local folder.

    Left out are folders, hidden files, and those whose names would act on a terminal.

    Raises:
        SourceUnavailable: no such folder, or it cannot be read.
        CheckpointError: a link that leads out of it, or too many files.
    """
    try:
        root = path.resolve(strict=True)
        entries = sorted(root.iterdir())
    except OSError as error:
        raise SourceUnavailable(f"{path.name}: {error.strerror}") from error
    if len(entries) > FILES_MAX:
        raise CheckpointError(f"{path.name}: more than {FILES_MAX} files")
    files: dict[str, RawFile] = {}
    for entry in entries:
        if entry.name.startswith(".") or not entry.name.isprintable() or entry.is_dir():
            continue
        files[entry.name] = LocalFile.at(entry.name, _inside(root, entry))
    return RawCheckpoint(
        files=files,
        model=model,
        source=source or f"file:{root.name}",
        revision=revision,
        license=license,
    )


def _inside(root: Path, entry: Path) -> Path:
    try:
        real = entry.resolve()
    except RuntimeError:
        raise CheckpointError(f"{entry.name}: a link that leads to itself") from None
    if real.is_relative_to(root):
        return real
    if root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs"):
        return real
    raise CheckpointError(f"{entry.name}: a link that leads out of its folder")


def open_file(
    path: Path,
    *,
    model: str,
    source: str | None = None,
    revision: str = "local",
    license: str | None = None,  # noqa: A002 - the field's name
) -> RawCheckpoint:
    """One local file, such as a `.gguf`; a link is followed, for the operator named it.

    Raises:
        SourceUnavailable: no such file, or it cannot be read.
        CheckpointError: not a regular file.
    """
    try:
        real = path.resolve(strict=True)
    except OSError as error:
        raise SourceUnavailable(f"{path.name}: {error.strerror}") from error
    return RawCheckpoint(
        files={path.name: LocalFile.at(path.name, real)},
        model=model,
        source=source or f"file:{path.name}",
        revision=revision,
        license=license,
    )
