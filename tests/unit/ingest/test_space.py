import os
from pathlib import Path

import pytest

from serverlessllm.core.errors import OutOfSpace
from serverlessllm.core.units import TIB
from serverlessllm.ingest.space import WorkSpace


def test_room_is_promised_once_and_given_back(tmp_path: Path) -> None:
    space = WorkSpace(tmp_path, 0)
    disk = os.statvfs(tmp_path)
    most = disk.f_bavail * disk.f_frsize * 2 // 3
    promised, second = space.reserve(most, tmp_path / "a"), space.reserve(most, tmp_path / "b")
    with promised, pytest.raises(OutOfSpace, match="free"), second:
        pass
    with space.reserve(most, tmp_path / "b"):
        pass


def test_what_lies_there_already_counts(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.bin.partial").write_bytes(b"x" * 1_000_000)
    space = WorkSpace(tmp_path, 0)
    with space.reserve(1_000_000, folder):
        pass
    with pytest.raises(OutOfSpace), space.reserve(1000 * TIB, folder):
        pass
