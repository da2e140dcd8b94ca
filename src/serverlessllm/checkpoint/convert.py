"""Raw weights → `.idx` + `.bin`: streamed, deterministic, resumable, verified after writing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from serverlessllm.checkpoint.index import (
    BIN_NAME,
    CHUNK_BYTES,
    IDX_NAME,
    Index,
    checkpoint_id,
    decode_index,
    encode_index,
)
from serverlessllm.checkpoint.journal import Journal
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.reader import verify
from serverlessllm.checkpoint.sources.base import RawCheckpoint
from serverlessllm.checkpoint.sources.gguf import gguf_layout
from serverlessllm.checkpoint.sources.pick import pick
from serverlessllm.checkpoint.sources.safetensors import safetensors_layout
from serverlessllm.checkpoint.writer import translating_disk_errors, write_bin
from serverlessllm.core.errors import Conflict, CorruptChunk, OutOfSpace
from serverlessllm.core.ids import CheckpointId

PARTIAL_SUFFIX = ".partial"
JOURNAL_NAME = "model.journal"


class ChunkDone(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk is written: `size_bytes` bytes at `offset` of the file at `path` are final.

    The file loses its suffix when all is verified; a descriptor opened before stays good.
    """

    path: Path
    number: int
    offset: int
    size_bytes: int
    total_bytes: int
    """Of the whole `.bin`."""


class Converted(msgspec.Struct, frozen=True, kw_only=True):
    """A finished checkpoint on a local disk."""

    id: CheckpointId
    idx_path: Path
    bin_path: Path
    size_bytes: int
    """Of the `.bin`."""
    index: Index


def plan_layout(raw: RawCheckpoint) -> Layout:
    """Choose among the files of a source, read their headers, and plan the `.bin`.

    Raises:
        CheckpointError: what is there is not valid, or not supported; says the way out.
        SourceUnavailable: a file cannot be read.
    """
    chosen = pick(raw.files)
    if chosen.format == "gguf":
        return gguf_layout(raw.files[chosen.weights[0]])
    return safetensors_layout(raw, chosen)


def convert(
    raw: RawCheckpoint,
    out_dir: Path,
    *,
    on_chunk: Callable[[ChunkDone], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Converted:
    """Write `model.bin` and `model.idx` into `out_dir`. Blocking: give it a process or a thread.

    Memory: two chunks and the header. `on_chunk` is called for each chunk in order, also
    for those that a run before a crash has left. The same input always gives the same bytes. An
    `.idx` in `out_dir` means that the `.bin` beside it is whole and was read back from the disk.

    Raises:
        CheckpointError: the source is not valid, or not supported; says the way out.
        SourceUnavailable: it cannot be read now; call again to go on.
        OutOfSpace: nothing is left behind.
        Conflict: another conversion is writing to `out_dir`.
    """
    layout = plan_layout(raw)
    with translating_disk_errors(layout.size_bytes), _only_writer(out_dir):
        try:
            with translating_disk_errors(layout.size_bytes):
                return _convert(raw, layout, out_dir, on_chunk, chunk_bytes)
        except (OutOfSpace, CorruptChunk):
            _discard(out_dir)
            raise


def _convert(
    raw: RawCheckpoint,
    layout: Layout,
    out_dir: Path,
    on_chunk: Callable[[ChunkDone], None] | None,
    chunk_bytes: int,
) -> Converted:
    bin_path, idx_path = out_dir / BIN_NAME, out_dir / IDX_NAME
    partial = out_dir / (BIN_NAME + PARTIAL_SUFFIX)

    def tell(number: int, offset: int, size_bytes: int) -> None:
        if on_chunk is not None:
            on_chunk(
                ChunkDone(
                    path=partial,
                    number=number,
                    offset=offset,
                    size_bytes=size_bytes,
                    total_bytes=layout.size_bytes,
                )
            )

    journal_path = out_dir / JOURNAL_NAME
    if journal_path.exists() and bin_path.exists() and not partial.exists():
        # Stopped between the two renames (or after them): take the `.bin` back to its own work.
        idx_path.unlink(missing_ok=True)
        bin_path.rename(partial)
    partial.touch()  # before the journal: the two rules above and below hold at every kill
    with Journal(journal_path, layout.fingerprint(chunk_bytes)) as journal:
        write_bin(layout, partial, journal, chunk_bytes=chunk_bytes, on_chunk=tell)
        idx = encode_index(layout.index(raw, journal.chunks, chunk_bytes))
        index = decode_index(idx)  # what we write, every reader must accept
        verify(partial, index)
        _finish(idx, idx_path, partial, bin_path)
    journal_path.unlink()
    return Converted(
        id=checkpoint_id(idx),
        idx_path=idx_path,
        bin_path=bin_path,
        size_bytes=index.size_bytes,
        index=index,
    )


def _finish(idx: bytes, idx_path: Path, partial: Path, bin_path: Path) -> None:
    """Make both files appear, the `.idx` last: whoever sees it has a whole checkpoint."""
    idx_partial = idx_path.with_name(idx_path.name + PARTIAL_SUFFIX)
    with idx_partial.open("wb") as file:
        file.write(idx)
        file.flush()
        os.fsync(file.fileno())
    idx_path.unlink(missing_ok=True)
    partial.rename(bin_path)
    _sync_folder(bin_path.parent)
    idx_partial.rename(idx_path)
    _sync_folder(bin_path.parent)


def _discard(out_dir: Path) -> None:
    """Leave nothing of work that is not worth going on from."""
    for name in (BIN_NAME + PARTIAL_SUFFIX, IDX_NAME + PARTIAL_SUFFIX, JOURNAL_NAME):
        (out_dir / name).unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _only_writer(out_dir: Path) -> Iterator[None]:
    """A lock that dies with its process."""
    out_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(out_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Conflict("another conversion is writing to this folder") from None
    try:
        yield
    finally:
        os.close(fd)
