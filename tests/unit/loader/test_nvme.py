"""Direct I/O, and the file systems that refuse it."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from serverlessllm.loader import measure
from serverlessllm.loader.tiers.nvme import DirectFile

SIZE = 3 * 4096 + 100


@pytest.fixture
def memory() -> memoryview:
    return memoryview(mmap.mmap(-1, 4 * 4096))


@pytest.fixture(params=["direct", "refused when opened", "refused when used"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    real_open, real_read, real_write = os.open, os.preadv, os.pwrite
    direct: set[int] = set()

    def refuse(fd: int) -> None:
        if fd in direct:
            raise OSError(errno.EINVAL, "refused")

    def open_(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and request.param == "refused when opened":
            raise OSError(errno.EINVAL, "refused")
        fd = real_open(path, flags, mode)
        if flags & os.O_DIRECT and request.param == "refused when used":
            direct.add(fd)
        return fd

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        refuse(fd)
        return real_read(fd, views, offset)

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        refuse(fd)
        return real_write(fd, view, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pwrite", pwrite)
    file = tmp_path / "file"
    file.write_bytes(b"")
    return file


def test_what_is_written_is_read_and_no_longer(path: Path, memory: memoryview) -> None:
    data = os.urandom(SIZE)
    memory[:SIZE] = data
    file = DirectFile(path, os.O_RDWR)
    with memory[:SIZE] as exact:
        file.write(exact, 4096)
    assert path.stat().st_size == 4096 + SIZE
    memory[:] = bytes(len(memory))
    file.read_into(memory, 4096, SIZE)
    assert memory[:SIZE] == data
    file.close()


def test_a_file_that_ends_too_early(path: Path, memory: memoryview) -> None:
    path.write_bytes(bytes(5000))
    file = DirectFile(path, os.O_RDONLY)
    with pytest.raises(OSError, match="shorter") as failure:
        file.read_into(memory, 0, SIZE)
    assert failure.value.errno == errno.EIO
    file.close()


def test_limits_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_DISK_BYTES", 1 << 22)
    monkeypatch.setattr(measure, "_MEMCPY_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "_BUDGET_S", 0.0)
    limits = measure.measured_limits(tmp_path)
    assert limits.disk_bytes_s > 0
    assert limits.memcpy_bytes_s > 0
    assert measure.measured_limits(tmp_path) == limits
    (tmp_path / ".limits.json").write_text("{")
    assert measure.measured_limits(tmp_path).disk_bytes_s > 0
    assert [path.name for path in tmp_path.iterdir()] == [".limits.json"]
