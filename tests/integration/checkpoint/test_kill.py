"""`kill -9` of the converter at any point: the next run converges on the same bytes."""

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

SOURCES: dict[str, Callable[[Path], Path]] = {
    "safetensors": write_random_safetensors,
    "shards": lambda path: write_random_safetensors(path, shards=3, seed=1),
    "gguf": lambda path: write_random_gguf(path.with_suffix(".gguf")),
}
CHUNKS = 24
"""Each is written, and noted: over 50 points a source."""


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
    source = SOURCES[kind](tmp_path / "raw")
    opened = open_folder if source.is_dir() else open_file
    whole = convert(opened(source, model="test/model"), tmp_path / "whole")
    chunk_bytes = 1 << (whole.size_bytes // CHUNKS).bit_length()
    expected = tmp_path / "expected"
    convert(opened(source, model="test/model"), expected, chunk_bytes=chunk_bytes)
    out = quick_disk / "out"
    script = Path(__file__).with_name("killing.py")
    arguments = (source, expected, out, chunk_bytes, 7)
    ended = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    points, killed_again = map(int, ended.stdout.split())
    assert points >= 40
    assert killed_again >= points // 3
