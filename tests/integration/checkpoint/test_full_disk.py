"""A disk that is really full: a clear refusal, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from serverlessllm.testing.checkpoints import write_random_safetensors


def _small_disk(folder: Path) -> tuple[str, ...]:
    """A command before a command that gives it 1 MiB in `folder`, by what this machine allows."""
    mount = f'mount -t tmpfs -o size=1m tmpfs "{folder}" && exec "$@"; exit 99'
    show = f'"$@"; status=$?; find "{folder}" -type f; exit $status'
    namespace = ("unshare", "-m") if os.geteuid() == 0 else ("unshare", "-rm")
    command = (*namespace, "sh", "-c", mount, "sh", "sh", "-c", show, "sh")
    if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    limit = f'ulimit -f 2048; "$@"; status=$?; find "{folder}" -type f; exit $status'
    return ("sh", "-c", limit, "sh")  # the kernel's limit of 1 MiB a file


def test_a_full_disk(run_converter: Any, tmp_path: Path) -> None:
    big = write_random_safetensors(tmp_path / "big", width=256)
    assert sum(path.stat().st_size for path in big.iterdir()) > 1 << 20
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = run_converter(big, disk / "out", wrapper=_small_disk(disk))
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("out_of_space: ")
    assert "MiB" in ended.stderr
    assert ended.stdout == ""  # no file is left


def test_a_limit_on_the_size_of_a_file(run_converter: Any, tmp_path: Path) -> None:
    big = write_random_safetensors(tmp_path / "big", width=256)
    limited = ("sh", "-c", 'ulimit -f 2048; exec "$@"', "sh")
    ended = run_converter(big, tmp_path / "out", wrapper=limited)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith("out_of_space: the disk cannot hold")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_fits_a_small_disk_is_converted(run_converter: Any, tmp_path: Path) -> None:
    small = write_random_safetensors(tmp_path / "small")
    disk = tmp_path / "disk"
    disk.mkdir()
    ended = run_converter(small, disk / "out", wrapper=_small_disk(disk))
    assert ended.returncode == 0, ended.stderr
    left = sorted(Path(line).name for line in ended.stdout.splitlines()[1:])
    assert left == ["model.bin", "model.idx", "model.journal"]
