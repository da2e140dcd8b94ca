"""`kill -9` of the converter at over a hundred points: the next run converges on the same bytes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources.base import open_file, open_folder
from serverlessllm.testing.checkpoints import write_random_gguf, write_random_safetensors


def write_torch(folder: Path) -> Path:
    """A `pytorch_model.bin`, with a view that has to be put in order while it is read."""
    import torch
    from safetensors.torch import load_file

    write_random_safetensors(folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].t().contiguous().t()
    torch.save(tensors, folder / "pytorch_model.bin")
    weights.unlink()
    return folder


SOURCES: dict[str, tuple[Callable[[Path], Path], int, int]] = {
    "safetensors": (write_random_safetensors, 48, 1),
    "shards": (lambda path: write_random_safetensors(path, shards=3, seed=1), 12, 1),
    "gguf": (lambda path: write_random_gguf(path.with_suffix(".gguf")), 12, 1),
    "torch": (write_torch, 3, 3),
}
"""Who makes it, of how many chunks at most (each is written and noted: two points), and every
how many points one is tried: reading a pickle costs a process each time."""


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: a kill leaves the same there, and syncing costs nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("kind", SOURCES)
def test_killed_at_every_change_of_the_disk_and_again_while_resuming(
    kind: str, tmp_path: Path, quick_disk: Path
) -> None:
    make, chunks, step = SOURCES[kind]
    source = make(tmp_path / "raw")
    opened = open_folder if source.is_dir() else open_file
    whole = convert(opened(source, model="test/model"), tmp_path / "whole")
    chunk_bytes = 1 << (whole.size_bytes // chunks).bit_length()
    expected = tmp_path / "expected"
    convert(opened(source, model="test/model"), expected, chunk_bytes=chunk_bytes)
    out = quick_disk / "out"
    script = Path(__file__).with_name("killing.py")
    arguments = (source, expected, out, chunk_bytes, step)
    ended = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    points, killed_again = map(int, ended.stdout.split())
    assert points >= (chunks + 12) // step
    assert killed_again >= points // 3
