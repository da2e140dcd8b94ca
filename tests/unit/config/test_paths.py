"""Where a process keeps its things."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serverlessllm.config.paths import cluster_token, derive, make_private, runtime_dir
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


def test_the_last_one_out_removes_the_sockets(tmp_path):
    directory = tmp_path / "run"
    with runtime_dir(directory):
        with runtime_dir(directory):
            (directory / "a-1").mkdir()
            (directory / "a-1" / "lock").touch()
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(directory / "a-1" / "agent.sock"))
        assert (directory / "a-1" / "lock").exists()
    assert not directory.exists()


def test_records_of_a_killed_agents_processes_outlive_the_last_one_out(tmp_path):
    directory = tmp_path / "run"
    with runtime_dir(directory):
        (directory / "a-1").mkdir()
        (directory / "a-1" / "lock").touch()
        (directory / "a-1" / "process").write_text("1234 5678")
    assert [path.name for path in (directory / "a-1").iterdir()] == ["process"]


def test_many_come_and_go_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from serverlessllm.config.paths import runtime_dir\n"
        "directory = Path(sys.argv[1])\n"
        "for _ in range(200):\n"
        "    with runtime_dir(directory):\n"
        "        (directory / sys.argv[2]).mkdir(); (directory / sys.argv[2]).rmdir()\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run"), str(number)])
        for number in range(3)
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert not (tmp_path / "run").exists()


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


def test_the_cluster_token_is_made_once_and_ours_alone(tmp_path):
    path = tmp_path / "cluster-token"
    token = cluster_token(path)
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert cluster_token(path) == token
    assert [p.name for p in tmp_path.iterdir()] == ["cluster-token"]


def test_processes_that_start_at_once_agree_on_one_token(tmp_path):
    path = tmp_path / "cluster-token"
    code = (
        "import sys; from pathlib import Path; from serverlessllm.config.paths import "
        "cluster_token; print(cluster_token(Path(sys.argv[1])))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    tokens = {process.communicate(timeout=30)[0].strip() for process in started}
    assert tokens == {path.read_text()}


def test_a_token_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "cluster-token"
    cluster_token(path)
    path.chmod(0o644)
    with pytest.raises(PermissionError, match="chmod 600"):
        cluster_token(path)
