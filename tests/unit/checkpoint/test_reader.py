"""Checking a `.bin`: any wrong byte is found, and named."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from serverlessllm.checkpoint.convert import Converted, convert
from serverlessllm.checkpoint.digests import (
    digest_chunk,
    matches_blake3,
    matches_crc32c,
    verify_chunk,
)
from serverlessllm.checkpoint.reader import verify
from serverlessllm.core.errors import CheckpointError, CorruptChunk
from serverlessllm.testing.checkpoints import RawTensorData, raw_checkpoint, safetensors_bytes

CHUNK_BYTES = 4096


@pytest.fixture
def converted(tmp_path: Path) -> Converted:
    """Five chunks: a tensor of one and a half, one of three, and a short rest."""
    tensors = {
        name: RawTensorData("U8", (size,), os.urandom(size))
        for name, size in (("embed", 6144), ("lm_head.weight", 12288))
    }
    raw = raw_checkpoint({"model.safetensors": safetensors_bytes(tensors), "config.json": b"{}"})
    return convert(raw, tmp_path, chunk_bytes=CHUNK_BYTES)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_whole_bin_passes(converted: Converted, threads: int) -> None:
    sizes: list[int] = []
    verify(converted.bin_path, converted.index, threads=threads, on_chunk=sizes.append)
    assert sum(sizes) == converted.size_bytes
    assert len(sizes) == len(converted.index.chunks) == 5


@pytest.mark.parametrize(
    ("offset", "named"),
    [
        (0, "chunk 0 .*'embed'"),
        (6143, "chunk 1 .*'embed'"),
        (8192, "chunk 2 .*'lm_head.weight'"),
        (18432, r"chunk 4 .*'lm_head.weight'"),
    ],
)
def test_a_flipped_bit_names_chunk_and_tensor(
    converted: Converted, offset: int, named: str
) -> None:
    position = min(offset, converted.size_bytes - 1)
    flip(converted.bin_path, position)
    with pytest.raises(CorruptChunk, match=named):
        verify(converted.bin_path, converted.index)


@pytest.mark.parametrize("threads", [1, 3])
def test_of_several_bad_chunks_the_first_is_named(converted: Converted, threads: int) -> None:
    for offset in (5000, 9000, 17000):
        flip(converted.bin_path, offset)
    with pytest.raises(CorruptChunk, match="chunk 1 of test/model"):
        verify(converted.bin_path, converted.index, threads=threads)


@pytest.mark.parametrize("change", [-1, 1, -4096, 4096])
def test_another_length_is_refused(converted: Converted, change: int) -> None:
    os.truncate(converted.bin_path, converted.size_bytes + change)
    with pytest.raises(CheckpointError, match="cut off"):
        verify(converted.bin_path, converted.index)


def test_a_lying_digest_is_found(converted: Converted) -> None:
    chunks = converted.index.chunks
    for chunk in (
        msgspec.structs.replace(chunks[2], crc32c=chunks[2].crc32c ^ 1),
        msgspec.structs.replace(chunks[2], blake3="0" * 64),
    ):
        index = msgspec.structs.replace(converted.index, chunks=(*chunks[:2], chunk, *chunks[3:]))
        with pytest.raises(CorruptChunk, match="chunk 2"):
            verify(converted.bin_path, index)


def test_a_missing_bin_or_a_link_is_refused(converted: Converted) -> None:
    moved = converted.bin_path.rename(converted.bin_path.with_name("moved"))
    with pytest.raises(CheckpointError, match=r"model\.bin: No such file"):
        verify(converted.bin_path, converted.index)
    converted.bin_path.symlink_to(moved)
    with pytest.raises(CheckpointError, match=r"model\.bin"):
        verify(converted.bin_path, converted.index)


def test_an_error_of_the_callback_is_the_callers(converted: Converted) -> None:
    def stop(size_bytes: int) -> None:
        raise KeyError(size_bytes)

    with pytest.raises(KeyError):
        verify(converted.bin_path, converted.index, on_chunk=stop)


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_digests_of_any_view(kind: type[bytes] | type[bytearray]) -> None:
    view = memoryview(kind(b"123456789"))
    chunk = digest_chunk(view)
    assert chunk.crc32c == 0xE3069283  # the check value of CRC-32C's definition
    assert verify_chunk(view, chunk)
    other = memoryview(kind(b"123456780"))
    assert not matches_blake3(other, chunk)
    assert not matches_crc32c(other, chunk)
    assert not verify_chunk(other, chunk)
