"""Local files: read exactly, never through a link that leads out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from serverlessllm.checkpoint.sources.base import open_file, open_folder, read_at
from serverlessllm.core.errors import CheckpointError, SourceUnavailable


def test_reads_at_an_offset(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    file = open_folder(tmp_path, model="m").files["a"]
    assert file.size_bytes == 10
    assert read_at(file, 3, 4) == b"3456"
    with pytest.raises(CheckpointError, match="ends at byte 10"):
        read_at(file, 8, 4)


def test_only_files_at_the_top_count(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / "folder").mkdir()
    raw = open_folder(tmp_path, model="m")
    assert list(raw.files) == ["a"]
    assert raw.source == f"file:{tmp_path.name}"
    assert str(tmp_path.parent) not in raw.source


def test_names_that_act_on_a_terminal_are_left_out(tmp_path: Path) -> None:
    for name in (b"\x1b[2J.bin", b"a\n", b"\xff\xfe.pt", "\u202e.gguf".encode()):
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).touch()
    (tmp_path / "caf\u00e9.bin").touch()
    assert list(open_folder(tmp_path, model="m").files) == ["caf\u00e9.bin"]


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert open_folder(tmp_path, model="m").files["link"].size_bytes == 1


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"config\.json: a link that leads out"):
        open_folder(folder, model="m")


def test_the_hub_cache_links_to_its_blobs_and_nowhere_else(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1234").write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    assert open_folder(snapshot, model="m").files["model.safetensors"].size_bytes == 7
    (snapshot / "config.json").symlink_to("../../refs")
    with pytest.raises(CheckpointError, match="leads out"):
        open_folder(snapshot, model="m")


def test_a_link_that_the_operator_names_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF")
    (tmp_path / "m.gguf").symlink_to("blob")
    assert open_file(tmp_path / "m.gguf", model="m").files["m.gguf"].size_bytes == 4
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "alias").symlink_to("folder")
    assert open_folder(tmp_path / "alias", model="m").files == {}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_folder(tmp_path, model="m")


def test_a_device_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_file(Path("/dev/zero"), model="m")


def test_what_is_missing_or_dangling_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable):
        open_folder(tmp_path / "none", model="m")
    with pytest.raises(SourceUnavailable):
        open_file(tmp_path / "none", model="m")
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(SourceUnavailable):
        open_folder(tmp_path, model="m")


def test_a_file_that_changes_between_reads_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    file = open_file(path, model="m").files["a"]
    assert read_at(file, 0, 6) == b"before"
    path.write_bytes(b"after!!")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read_at(file, 0, 6)


def test_a_link_swapped_in_later_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    (tmp_path / "secret").write_bytes(b"secret")
    file = open_file(path, model="m").files["a"]
    path.unlink()
    path.symlink_to("secret")
    with pytest.raises(SourceUnavailable):
        read_at(file, 0, 6)
