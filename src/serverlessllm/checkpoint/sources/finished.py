"""A checkpoint as a source: what `sllm convert` has made elsewhere, under another name perhaps.

Its bytes are taken as they are, each chunk checked against the digests that came with it.
"""

from __future__ import annotations

import msgspec

from serverlessllm.checkpoint.bounds import INDEX_BYTES_MAX
from serverlessllm.checkpoint.digests import verify_chunk
from serverlessllm.checkpoint.index import BIN_NAME, IDX_NAME, Index, SideFile, decode_index
from serverlessllm.checkpoint.layout import Layout, Segment
from serverlessllm.checkpoint.reader import corrupt_chunk
from serverlessllm.checkpoint.side_files import CONFIG_BYTES_MAX, check_no_code
from serverlessllm.checkpoint.sources.base import (
    MemoryFile,
    RawCheckpoint,
    RawFile,
    read_all,
    read_at,
)
from serverlessllm.core.errors import CheckpointError


def finished_layout(raw: RawCheckpoint) -> Layout:
    """The layout that a checkpoint has already.

    Raises:
        CheckpointError: its index is not valid, or is of another `.bin`; or it names code, which
            no conversion of ours leaves in.
    """
    index = decode_index(read_all(raw.files[IDX_NAME], INDEX_BYTES_MAX))
    file = raw.files[BIN_NAME]
    if file.size_bytes != index.size_bytes:
        raise CheckpointError(
            f"{BIN_NAME} has {file.size_bytes} bytes where its index says {index.size_bytes}: "
            "it was cut off, or belongs to another index; convert it again"
        )
    whole = Segment(
        offset=0, size_bytes=index.size_bytes, file=_CheckedFile(file, index), source_offset=0
    )
    for side_file in index.side_files:
        if side_file.name.endswith("config.json"):  # a read of others would be a read of chunks
            check_no_code(_part(whole.file, side_file))
    return Layout(
        kind=index.kind,
        size_bytes=index.size_bytes,
        alignment_bytes=index.alignment_bytes,
        segments=(whole,),
        tensors=index.tensors,
        side_files=index.side_files,
        aliases=index.aliases,
        architecture=index.architecture,
        base=index.base,
        quantization=index.quantization,
        license=index.license,
    )


def _part(file: RawFile, of: SideFile) -> RawFile:
    """A side file where it lies in the `.bin`; one too long to look at is left to be refused."""
    size_bytes = min(of.size_bytes, CONFIG_BYTES_MAX + 1)
    return MemoryFile(of.name, read_at(file, of.offset, size_bytes))


class _CheckedFile(msgspec.Struct, frozen=True):
    """A `.bin` that is read by whole chunks, none of which is believed before it is checked."""

    file: RawFile
    index: Index

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    @property
    def version(self) -> str:
        return self.file.version

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As a `RawFile` does.

        Raises:
            CorruptChunk: a chunk is not what its digests say.
        """
        end = offset + len(buffer)
        for number in range(offset // self.index.chunk_bytes, len(self.index.chunks)):
            start, size = self.index.chunk_range(number)
            if start >= end:
                break
            if offset <= start and start + size <= end:
                self._read_chunk(number, start, buffer[start - offset : start - offset + size])
                continue
            chunk = memoryview(bytearray(size))
            self._read_chunk(number, start, chunk)
            first, last = max(start, offset), min(start + size, end)
            buffer[first - offset : last - offset] = chunk[first - start : last - start]

    def _read_chunk(self, number: int, start: int, view: memoryview) -> None:
        self.file.read_into(start, view)
        if not verify_chunk(view, self.index.chunks[number]):
            raise corrupt_chunk(self.index, number)
