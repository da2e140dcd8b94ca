"""The two digests of a chunk: each releases the GIL, so chunks are hashed in threads."""

from __future__ import annotations

from blake3 import blake3
from crc32c import crc32c

from serverlessllm.checkpoint.index import Chunk


def digest_chunk(view: memoryview) -> Chunk:
    """Both digests of a chunk's bytes."""
    return Chunk(blake3=blake3(view).hexdigest(), crc32c=crc32c(view))


def checksum(view: memoryview) -> int:
    """CRC32C of a chunk's bytes."""
    return int(crc32c(view))


def matches_blake3(view: memoryview, chunk: Chunk) -> bool:
    """Whether bytes from a network or a store are the chunk (5 GB/s a core)."""
    return blake3(view).hexdigest() == chunk.blake3


def matches_crc32c(view: memoryview, chunk: Chunk) -> bool:
    """Whether bytes that a tier of this machine was given are unchanged (15 GB/s a core)."""
    return bool(crc32c(view) == chunk.crc32c)


def verify_chunk(view: memoryview, chunk: Chunk) -> bool:
    """Whether both digests match."""
    return matches_crc32c(view, chunk) and matches_blake3(view, chunk)
