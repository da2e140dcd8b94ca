"""Where each byte of a `.bin` comes from: the plan that the writer carries out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import msgspec
from blake3 import blake3

from serverlessllm.checkpoint.index import (
    KIND_TENSORS,
    TENSOR_ALIGNMENT_BYTES,
    Chunk,
    Index,
    Quantization,
    SideFile,
    Tensor,
)
from serverlessllm.checkpoint.order import execution_key
from serverlessllm.checkpoint.sources.base import RawCheckpoint, RawFile


class RawTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor where it lies in a source's file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: RawFile
    offset: int
    size_bytes: int


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """`size_bytes` bytes at `source_offset` of `file` that belong at `offset` of the `.bin`."""

    offset: int
    size_bytes: int
    file: RawFile
    source_offset: int


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A whole `.bin` before it is written. Segments are sorted; gaps are zeros."""

    kind: str
    size_bytes: int
    alignment_bytes: int = TENSOR_ALIGNMENT_BYTES
    segments: tuple[Segment, ...]
    tensors: tuple[Tensor, ...]
    side_files: tuple[SideFile, ...] = ()
    aliases: dict[str, str] = {}
    architecture: str | None = None
    base: str | None = None
    quantization: Quantization | None = None
    """What was done to the weights before they became this source."""
    license: str | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes that belong at `offset`. Thread-safe."""
        end, position = offset + len(buffer), offset
        first = bisect_right(self.segments, offset, key=lambda segment: segment.offset) - 1
        for number in range(max(first, 0), len(self.segments)):
            segment = self.segments[number]
            if segment.offset >= end:
                break
            start = max(segment.offset, position)
            stop = min(segment.offset + segment.size_bytes, end)
            if stop <= start:
                continue
            buffer[position - offset : start - offset] = bytes(start - position)
            segment.file.read_into(
                segment.source_offset + start - segment.offset,
                buffer[start - offset : stop - offset],
            )
            position = stop
        buffer[position - offset :] = bytes(end - position)

    def index(self, raw: RawCheckpoint, chunks: Sequence[Chunk], chunk_bytes: int) -> Index:
        """The index of this layout once its chunks are known."""
        return Index(
            model=raw.model,
            source=raw.source,
            revision=raw.revision,
            license=raw.license or self.license,
            architecture=self.architecture,
            base=self.base,
            quantization=self.quantization,
            kind=self.kind,
            size_bytes=self.size_bytes,
            alignment_bytes=self.alignment_bytes,
            chunk_bytes=chunk_bytes,
            chunks=tuple(chunks),
            tensors=self.tensors,
            side_files=self.side_files,
            aliases=self.aliases,
        )

    def fingerprint(self, chunk_bytes: int) -> str:
        """Equal only if the same files would be written to the same places, in the same chunks."""
        parts = [
            (
                s.offset,
                s.size_bytes,
                s.file.name,
                s.file.size_bytes,
                s.file.version,
                s.source_offset,
            )
            for s in self.segments
        ]
        return blake3(msgspec.json.encode((chunk_bytes, self.size_bytes, parts))).hexdigest()


def arrange(
    tensors: Iterable[RawTensor],
    side_files: Iterable[RawFile],
    *,
    aliases: dict[str, str],
    architecture: str | None,
) -> Layout:
    """Lay tensors in execution order, then side files by name, each at a multiple of 64 bytes."""
    end = 0
    segments: list[Segment] = []
    placed: list[Tensor] = []
    placed_files: list[SideFile] = []
    for raw in sorted(tensors, key=lambda raw: execution_key(raw.name)):
        offset = _aligned(end)
        end = offset + raw.size_bytes
        _add(
            segments,
            Segment(
                offset=offset, size_bytes=raw.size_bytes, file=raw.file, source_offset=raw.offset
            ),
        )
        placed.append(
            Tensor(
                name=raw.name,
                dtype=raw.dtype,
                shape=raw.shape,
                offset=offset,
                size_bytes=raw.size_bytes,
            )
        )
    for file in sorted(side_files, key=lambda file: file.name):
        offset = _aligned(end)
        end = offset + file.size_bytes
        _add(
            segments, Segment(offset=offset, size_bytes=file.size_bytes, file=file, source_offset=0)
        )
        placed_files.append(SideFile(name=file.name, offset=offset, size_bytes=file.size_bytes))
    return Layout(
        kind=KIND_TENSORS,
        size_bytes=end,
        segments=tuple(segments),
        tensors=tuple(placed),
        side_files=tuple(placed_files),
        aliases=aliases,
        architecture=architecture,
    )


def _aligned(offset: int) -> int:
    return -(-offset // TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES


def _add(segments: list[Segment], segment: Segment) -> None:
    """Join neighbours that are neighbours in the source too: one read instead of many."""
    if segment.size_bytes == 0:
        return
    last = segments[-1] if segments else None
    if (
        last is not None
        and last.file is segment.file
        and last.offset + last.size_bytes == segment.offset
        and last.source_offset + last.size_bytes == segment.source_offset
    ):
        segments[-1] = msgspec.structs.replace(
            last, size_bytes=last.size_bytes + segment.size_bytes
        )
    else:
        segments.append(segment)
