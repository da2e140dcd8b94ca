"""Memory while converting depends on the chunk, not on the model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

MIB = 1 << 20
LIMIT_BYTES = 64 * MIB


def write_sparse_safetensors(folder: Path, tensors: int, size: int) -> Path:
    """A model of zeros that takes no disk."""
    folder.mkdir()
    header = {
        f"model.layers.{n}.w": {
            "dtype": "F8_E4M3",
            "shape": [size],
            "data_offsets": [n * size, (n + 1) * size],
        }
        for n in range(tensors)
    }
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + tensors * size)
    return folder


def test_a_model_of_20_times_the_memory_limit(run_converter: Any, tmp_path: Path) -> None:
    """The kernel holds it to 64 MiB of data: its heap, its stacks and its buffers together."""
    source = write_sparse_safetensors(tmp_path / "raw", tensors=80, size=16 * MIB)
    ended = run_converter(source, tmp_path / "out", chunk_bytes=4 * MIB, data_bytes_max=LIMIT_BYTES)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "model.bin").stat().st_size == 20 * LIMIT_BYTES
    shutil.rmtree(tmp_path / "out")
    assert int(ended.stdout) * 1024 <= 256 * MIB


def test_the_limit_is_one(run_converter: Any, tmp_path: Path) -> None:
    """The same limit ends a conversion whose chunks are bigger than it."""
    source = write_sparse_safetensors(tmp_path / "raw", tensors=1, size=128 * MIB)
    ended = run_converter(
        source, tmp_path / "out", chunk_bytes=64 * MIB, data_bytes_max=LIMIT_BYTES
    )
    assert ended.returncode != 0
    assert not (tmp_path / "out" / "model.idx").exists()


def test_chunks_as_they_are_by_default(run_converter: Any, tmp_path: Path) -> None:
    source = write_sparse_safetensors(tmp_path / "raw", tensors=24, size=8 * MIB)
    ended = run_converter(source, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) * 1024 <= 128 * MIB
