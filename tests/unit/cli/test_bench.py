"""`sllm bench load`: what it prints, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from crc32c import crc32c
from typer.testing import CliRunner

from serverlessllm.checkpoint.index import Chunk, Index, Tensor, encode_index
from serverlessllm.cli.failure import Failure
from serverlessllm.cli.main import app
from serverlessllm.core.units import MIB

TIERS = ("store", "nvme", "dram")


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", 3 * MIB)


def write_checkpoint(folder: Path, size_bytes: int) -> Path:
    folder.mkdir()
    data = random.Random(7).randbytes(size_bytes)
    parts = [data[at : at + MIB] for at in range(0, size_bytes, MIB)]
    index = Index(
        model="bench/model",
        source="file:///bench",
        revision="r1",
        kind="tensors",
        size_bytes=size_bytes,
        chunk_bytes=MIB,
        chunks=tuple(Chunk(blake3=blake3(p).hexdigest(), crc32c=crc32c(p)) for p in parts),
        tensors=(
            Tensor(name="w", dtype="U8", shape=(size_bytes,), offset=0, size_bytes=size_bytes),
        ),
    )
    (folder / "model.bin").write_bytes(data)
    (folder / "model.idx").write_bytes(encode_index(index))
    return folder


def bench(*arguments: str, data_dir: Path) -> str:
    done = CliRunner().invoke(
        app, ["bench", "load", *arguments, "--data-dir", str(data_dir)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("tier", TIERS)
def test_json_says_everything(folder, tmp_path, tier):
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ("--tier", tier, "--rounds", "1", "--disk", str(disk), "--json")
    report = json.loads(bench(str(folder), *options, data_dir=tmp_path / "data"))
    assert report["hop"].startswith(f"{tier}→")
    assert report["size_bytes"] == 3 * MIB
    assert report["bytes_s"] > 0
    assert report["stages"]
    assert list(disk.iterdir()) == []
    assert not (tmp_path / "data").exists()


def test_people_read_the_ratio_first(folder, tmp_path):
    shown = bench(str(folder / "model.idx"), "--rounds", "1", data_dir=tmp_path).splitlines()
    assert shown[0].startswith("nvme→dram: ")
    assert "of this machine's limit" in shown[0]
    assert "(3.0 MiB, median of 1 round)" in shown[0]
    assert "O_DIRECT reads of the same file" in shown[1]
    assert any(line.startswith("verification: ") for line in shown)
    assert any(line.startswith("page cache: ") for line in shown)


def test_bytes_that_are_copied_are_counted(folder, tmp_path):
    shown = bench(str(folder), "--tier", "dram", "--rounds", "1", data_dir=tmp_path)
    assert "copied in the other process: 0 bytes" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none",), "no such folder or file"),
        (("{folder}", "--disk", "/proc"), "has only 0 B free"),
        (("{folder}", "--disk", "/none/at/all"), "/none/at/all: No such file"),
    ],
)
def test_a_failure_names_its_cause(folder, tmp_path, arguments, said):
    arguments = [text.format(folder=folder) for text in arguments]
    with pytest.raises(Failure, match=said) as failed:
        bench(*arguments, "--rounds", "1", data_dir=tmp_path)
    assert failed.value.cure


def test_a_tier_that_is_none(folder, tmp_path):
    done = CliRunner().invoke(app, ["bench", "load", str(folder), "--tier", "moon"])
    assert done.exit_code == 2
    assert "'device'" in done.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_trace(folder, tmp_path, number):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = (sys.executable, "-m", "serverlessllm.cli.main", "bench", "load", str(folder))
    process = subprocess.Popen(
        [*command, "--rounds", "1000", "--disk", str(disk)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
        text=True,
    )
    assert process.stderr is not None
    assert "loading" in process.stderr.readline()  # it runs
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert list(disk.iterdir()) == []
