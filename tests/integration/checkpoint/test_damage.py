"""`sllm verify` finds a thousand random damages, and names the chunk and what lies in it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from serverlessllm.checkpoint.convert import Converted, convert
from serverlessllm.checkpoint.index import SideFile, Tensor
from serverlessllm.cli.failure import Failure
from serverlessllm.cli.verify import verify
from serverlessllm.testing.checkpoints import RawTensorData, raw_checkpoint, safetensors_bytes

CHUNK_BYTES = 4096


@pytest.fixture
def whole(tmp_path: Path) -> Converted:
    """About thirty chunks: tensors of all sizes, much padding between them, side files."""
    chance = random.Random(1)
    sizes = [chance.choice((1, 3, 65, 700, 4097, 9000)) for _ in range(60)]
    tensors = {
        f"model.layers.{n}.w": RawTensorData("U8", (size,), chance.randbytes(size))
        for n, size in enumerate(sizes)
    }
    raw = raw_checkpoint(
        {
            "model.safetensors": safetensors_bytes(tensors),
            "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
            "tokenizer.json": json.dumps({"vocab": list(range(2000))}).encode(),
        }
    )
    return convert(raw, tmp_path / "whole", chunk_bytes=CHUNK_BYTES)


def verdict(folder: Path, capsys: pytest.CaptureFixture[str], id: str | None = None) -> Any:  # noqa: A002
    """What the verb says of a damaged checkpoint, as a script reads it."""
    with pytest.raises(Failure) as failure:
        verify(str(folder), id=id, json=True)
    assert failure.value.exit_status == 1
    return json.loads(capsys.readouterr().out)


def parts_in_chunk(whole: Converted, number: int) -> list[str]:
    start, end = number * CHUNK_BYTES, (number + 1) * CHUNK_BYTES
    parts: tuple[Tensor | SideFile, ...] = (*whole.index.tensors, *whole.index.side_files)
    return [
        part.name for part in parts if part.offset < end and part.offset + part.size_bytes > start
    ]


def check_named(whole: Converted, found: Any, numbers: list[int]) -> None:
    assert [bad["number"] for bad in found["bad_chunks"]] == numbers
    assert found["bad_chunks_count"] == len(numbers)
    for bad in found["bad_chunks"]:
        parts = parts_in_chunk(whole, bad["number"])
        assert (bad["parts"], bad["parts_count"]) == (parts[:16], len(parts))


def test_700_flips_in_the_bin(whole: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors, side files and the padding between them alike; one bit, or three at once."""
    chance = random.Random(2)
    fd = os.open(whole.bin_path, os.O_RDWR)
    for case in range(700):
        places = chance.sample(range(whole.size_bytes), 3 if case % 7 == 0 else 1)
        before = [os.pread(fd, 1, place) for place in places]
        for place, byte in zip(places, before, strict=True):
            os.pwrite(fd, bytes([byte[0] ^ 1 << chance.randrange(8)]), place)
        found = verdict(whole.bin_path.parent, capsys)
        check_named(whole, found, sorted({place // CHUNK_BYTES for place in places}))
        for place, byte in zip(places, before, strict=True):
            os.pwrite(fd, byte, place)
    os.close(fd)
    verify(str(whole.bin_path))
    assert "verified" in capsys.readouterr().out


def test_150_lengths_of_the_bin(whole: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(3)
    data = whole.bin_path.read_bytes()
    chunks = len(whole.index.chunks)
    for _ in range(150):
        size = chance.choice((chance.randrange(len(data)), len(data) + chance.randrange(1, 9000)))
        whole.bin_path.write_bytes(data[:size].ljust(size, b"\0"))
        found = verdict(whole.bin_path.parent, capsys)
        cut_off = range(size // CHUNK_BYTES, chunks) if size < len(data) else ()
        check_named(whole, found, list(cut_off))
        assert found["size_bytes"] == size
        assert found["excess_bytes"] == max(size - len(data), 0)


def test_150_damages_of_the_index(whole: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that leave it an index are known by its id, noted where it was made, or given."""
    chance = random.Random(4)
    data = whole.idx_path.read_bytes()
    decoded = 0
    for case in range(150):
        place = chance.randrange(len(data))
        flipped = bytes([data[place] ^ 1 << chance.randrange(8)])
        cut = case % 10 == 0
        whole.idx_path.write_bytes(data[:place] + (b"" if cut else flipped + data[place + 1 :]))
        if case == 75:
            (whole.idx_path.parent / "model.journal").unlink()
        with pytest.raises(Failure) as failure:
            verify(str(whole.idx_path), id=None if case < 75 else whole.id, json=True)
        printed = capsys.readouterr().out
        if not printed:
            assert "model.idx" in str(failure.value)
            continue
        decoded += 1
        found = json.loads(printed)
        assert found["index_checked_by"] == ("model.journal" if case < 75 else "--id")
        assert whole.id in found["index_problem"]
        assert found["checkpoint"] != whole.id
    assert decoded > 20


def test_people_read_all_of_it(whole: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(whole.bin_path.read_bytes())
    data[2 * CHUNK_BYTES] ^= 4
    whole.bin_path.write_bytes(data[: 12 * CHUNK_BYTES + 1])
    with pytest.raises(Failure, match=r"model\.bin is damaged"):
        verify(str(whole.bin_path), id="0" * 64)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"model.idx: its id is {whole.id}, but --id says 0000")
    assert lines[1].startswith(f"model.bin: {12 * CHUNK_BYTES + 1} bytes where the index says")
    named = ", ".join(parts_in_chunk(whole, 2)[:16])
    assert lines[2].startswith(f"chunk 2 (bytes 8192 to 12288) does not match its digest: {named}")
    assert lines[3].startswith("chunk 12 ")
    assert " is cut off: " in lines[3]
    assert len(lines) == 3 + len(whole.index.chunks) - 12


def test_an_id_that_is_none_is_refused(whole: Converted) -> None:
    with pytest.raises(Failure, match="64 hexadecimal"):
        verify(str(whole.bin_path), id="abc")
