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
    Quantization,
    checkpoint_id,
    decode_index,
    encode_index,
)
from serverlessllm.checkpoint.journal import JOURNAL_NAME, Journal, is_of
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.reader import verify
from serverlessllm.checkpoint.sources.adapter import adapter_layout
from serverlessllm.checkpoint.sources.base import RawCheckpoint
from serverlessllm.checkpoint.sources.finished import finished_layout
from serverlessllm.checkpoint.sources.gguf import gguf_layout
from serverlessllm.checkpoint.sources.pick import pick
from serverlessllm.checkpoint.sources.safetensors import safetensors_layout
from serverlessllm.checkpoint.sources.torch_zip import torch_layout
from serverlessllm.checkpoint.writer import translating_disk_errors, write_all, write_bin
from serverlessllm.core.errors import CheckpointError, Conflict, CorruptChunk, OutOfSpace
from serverlessllm.core.ids import CheckpointId

PARTIAL_SUFFIX = ".partial"


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
    if chosen.format == "checkpoint":
        return finished_layout(raw)
    if chosen.format == "gguf":
        return gguf_layout(raw.files[chosen.weights[0]])
    layout_of = torch_layout if chosen.format == "torch" else safetensors_layout
    layout = layout_of(raw, chosen)
    return adapter_layout(raw, layout) if chosen.adapter else layout


def convert(
    raw: RawCheckpoint,
    out_dir: Path,
    *,
    on_chunk: Callable[[ChunkDone], None] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    quantization: Quantization | None = None,
) -> Converted:
    """Write `model.bin` and `model.idx` into `out_dir`. Blocking: give it a process or a thread.

    Memory: up to 64 MiB of chunks (or two of them), and the header. `on_chunk` is called for each
    chunk in order, also for those that an earlier run has left. The same input always gives the
    same bytes. An `.idx` in `out_dir` means that the `.bin` beside it is whole and was read back
    from the disk. What is finished already is verified, and not converted again. `quantization`
    says what was done to the weights before: it is recorded, not done here.

    Raises:
        CheckpointError: the source is not valid, or not supported; says the way out.
        SourceUnavailable: it cannot be read now; call again to go on.
        OutOfSpace: nothing is left behind.
        CorruptChunk: the disk gives back other bytes than it was given; nothing is left behind.
        Conflict: another conversion is writing to `out_dir`.
    """
    layout = plan_layout(raw)
    if quantization is not None:
        layout = msgspec.structs.replace(layout, quantization=quantization)
    with translating_disk_errors(layout.size_bytes), _only_writer(out_dir):
        try:
            with translating_disk_errors(layout.size_bytes):
                return _Conversion(raw, layout, out_dir, on_chunk, chunk_bytes).run()
        except (OutOfSpace, CorruptChunk):
            _discard(out_dir)
            raise


class _Conversion:
    """One run: its layout, its names, and whom it tells."""

    def __init__(
        self,
        raw: RawCheckpoint,
        layout: Layout,
        out_dir: Path,
        on_chunk: Callable[[ChunkDone], None] | None,
        chunk_bytes: int,
    ) -> None:
        self._raw = raw
        self._layout = layout
        self._on_chunk = on_chunk
        self._chunk_bytes = chunk_bytes
        self._bin = out_dir / BIN_NAME
        self._idx = out_dir / IDX_NAME
        self._partial = out_dir / (BIN_NAME + PARTIAL_SUFFIX)
        self._journal = out_dir / JOURNAL_NAME

    def run(self) -> Converted:
        fingerprint = self._layout.fingerprint(self._chunk_bytes)
        ours = is_of(self._journal, fingerprint)
        if ours and self._bin.exists() and not self._partial.exists():
            # Finished, or stopped between the two renames: the `.bin` is what the journal is of.
            with Journal(self._journal, fingerprint) as journal:
                finished = self._finished(journal)
                if finished is not None:
                    return finished
            self._idx.unlink(missing_ok=True)
            self._bin.rename(self._partial)
        self._partial.touch()  # before the journal: what is said of `.bin` above holds at each kill
        with Journal(self._journal, fingerprint) as journal:
            write_bin(
                self._layout,
                self._partial,
                journal,
                chunk_bytes=self._chunk_bytes,
                on_chunk=lambda *chunk: self._tell(self._partial, *chunk),
            )
            idx = self._encode(journal)
            index = decode_index(idx)  # what we write, every reader must accept
            _finish(idx, self._idx, self._partial, self._bin)
            journal.finish(checkpoint_id(idx))
        return self._converted(idx, index)

    def _finished(self, journal: Journal) -> Converted | None:
        """What an earlier run has made of the same source, if there is nothing to do but to say so.

        Else None: it is damaged, not finished, or was given other names.
        """
        idx = self._encode(journal)
        try:
            if self._idx.read_bytes() != idx:
                return None
            index = decode_index(idx)
            verify(self._bin, index)
        except (CheckpointError, FileNotFoundError):
            return None
        for number in range(len(index.chunks)):
            self._tell(self._bin, number, *index.chunk_range(number))
        journal.finish(checkpoint_id(idx))
        return self._converted(idx, index)

    def _encode(self, journal: Journal) -> bytes:
        return encode_index(self._layout.index(self._raw, journal.chunks, self._chunk_bytes))

    def _tell(self, path: Path, number: int, offset: int, size_bytes: int) -> None:
        if self._on_chunk is not None:
            self._on_chunk(
                ChunkDone(
                    path=path,
                    number=number,
                    offset=offset,
                    size_bytes=size_bytes,
                    total_bytes=self._layout.size_bytes,
                )
            )

    def _converted(self, idx: bytes, index: Index) -> Converted:
        return Converted(
            id=checkpoint_id(idx),
            idx_path=self._idx,
            bin_path=self._bin,
            size_bytes=index.size_bytes,
            index=index,
        )


def _finish(idx: bytes, idx_path: Path, partial: Path, bin_path: Path) -> None:
    """Make both files appear, the `.idx` last: whoever sees it has a whole checkpoint."""
    idx_partial = idx_path.with_name(idx_path.name + PARTIAL_SUFFIX)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(idx_partial, flags, 0o644)
    try:
        write_all(fd, 0, memoryview(idx))
        os.fsync(fd)
    finally:
        os.close(fd)
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
