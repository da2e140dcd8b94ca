"""`kill -9` of the converter at any point: the next run converges on the same bytes."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import decode_index
from serverlessllm.checkpoint.reader import verify
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.testing.checkpoints import write_random_safetensors

CHUNK_BYTES = 16 * 1024


def result(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_random_safetensors(tmp_path / "raw", shards=2)


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    convert(open_folder(source, model="test/model"), tmp_path / "expected", chunk_bytes=CHUNK_BYTES)
    return result(tmp_path / "expected")


def check_promise(out: Path) -> None:
    """Whoever sees an index has a whole checkpoint, however its writer ended."""
    if (out / "model.idx").exists():
        verify(out / "model.bin", decode_index((out / "model.idx").read_bytes()))


def test_killed_at_chunks(
    run_converter: Any, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    chunks = len(decode_index(expected["model.idx"]).chunks)
    out = tmp_path / "out"
    for chunk in (*sorted(random.Random(7).sample(range(1, chunks - 1), 3)), chunks - 1):
        ended = run_converter(source, out, chunk_bytes=CHUNK_BYTES, kill_at_chunk=chunk)
        assert ended.returncode == -signal.SIGKILL
        assert not (out / "model.idx").exists()
        assert len((out / "model.journal").read_bytes().splitlines()) >= chunk + 2
    assert run_converter(source, out, chunk_bytes=CHUNK_BYTES).returncode == 0
    assert result(out) == expected


def test_killed_before_every_change_of_a_name(
    run_converter: Any, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Each run gets one call further than the last, over what the last one left."""
    out = tmp_path / "out"
    for call in range(1, 40):
        ended = run_converter(source, out, chunk_bytes=CHUNK_BYTES, kill_at_call=call)
        check_promise(out)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL
    assert call > 8
    assert result(out) == expected
