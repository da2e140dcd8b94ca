"""Memory while converting depends on the chunk, not on the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MIB = 1 << 20


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


def test_200_mib_take_two_chunks_of_memory(run_converter: Any, tmp_path: Path) -> None:
    source = write_sparse_safetensors(tmp_path / "raw", tensors=50, size=4 * MIB)
    ended = run_converter(source, tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "model.bin").stat().st_size == 200 * MIB
    grown_kib = int(ended.stdout)
    assert grown_kib < (2 * 16 + 12) * 1024
