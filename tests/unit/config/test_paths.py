"""Where a process keeps its things."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serverlessllm.config.paths import derive, make_private
from serverlessllm.config.settings import Settings


def test_the_data_directory_follows_xdg(tmp_path):
    assert derive(Settings(), {"XDG_DATA_HOME": str(tmp_path)}).data_dir == (
        tmp_path / "serverlessllm"
    )
    assert derive(Settings(data_dir=str(tmp_path)), {}).data_dir == tmp_path


def test_two_data_directories_never_share_sockets(tmp_path):
    one = derive(Settings(data_dir=str(tmp_path / "1")), {}).runtime_dir
    two = derive(Settings(data_dir=str(tmp_path / "2")), {}).runtime_dir
    assert one != two
    assert one == derive(Settings(data_dir=str(tmp_path / "x" / ".." / "1")), {}).runtime_dir
    assert len(str(one)) < 40  # the rest of 107 bytes is for the sockets' names


def test_a_private_directory_is_made_and_kept_private(tmp_path):
    directory = tmp_path / "a" / "b"
    make_private(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o755)
    make_private(directory)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_link_or_a_stranger_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError, match="belongs to another user"):
        make_private(link)
    if os.getuid() == 0:
        os.chown(tmp_path / "real", 12345, -1)
        with pytest.raises(PermissionError, match="runtime_dir"):
            make_private(tmp_path / "real")
    assert Path(tmp_path / "real").is_dir()
