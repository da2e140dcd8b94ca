"""Doctor's findings on machines that lack something."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from serverlessllm.cli import doctor
from serverlessllm.cli.doctor import Health
from serverlessllm.config.load import Loaded, load
from serverlessllm.core.errors import StoreUnavailable
from serverlessllm.core.units import GIB, MIB
from serverlessllm.loader import measure

Usage = namedtuple("Usage", "total used free")


def settings(tmp_path: Path, **keys: object) -> Loaded:
    overrides: dict[str, object] = {"data_dir": str(tmp_path / "data")}
    overrides |= {key.replace("__", "."): value for key, value in keys.items()}
    return load(environ={}, cwd=tmp_path, overrides=overrides)


def test_a_dram_tier_on_a_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_file_system", lambda _: "ext4")
    assert doctor._dram(settings(tmp_path)).health is Health.BAD
    chosen = doctor._dram(settings(tmp_path, loader__dram_dir=str(tmp_path)))
    assert chosen.health is Health.POOR
    assert "tmpfs" in chosen.fix


def test_a_small_shm_names_the_containers_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(64 * MIB, 0, 64 * MIB))
    found = doctor._dram(settings(tmp_path))
    assert found.health is Health.POOR
    assert "--shm-size" in found.fix


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(GIB, GIB, 0))
    found = doctor._disk(settings(tmp_path))
    assert found.health is Health.POOR
    assert "free space" in found.fix


def test_a_busy_machine_is_said(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (500.0, 0, 0))
    assert doctor._cores().health is Health.POOR


def test_bandwidth_is_measured_and_a_slow_disk_is_said(tmp_path, monkeypatch):
    memory, disk = doctor._bandwidth(settings(tmp_path))
    assert "/s" in memory.text
    assert "/s" in disk.text
    assert list(tmp_path.iterdir()) == []  # nothing is left behind

    monkeypatch.setattr(measure, "measure_disk", lambda _: 10.0 * MIB)
    _, disk = doctor._bandwidth(settings(tmp_path))
    assert disk.health is Health.POOR
    assert "SSD" in disk.fix

    def fail(_: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measure, "measure_disk", fail)
    _, disk = doctor._bandwidth(settings(tmp_path))
    assert "No space left" in disk.text


def test_backends_are_found():
    names = {finding.name: finding.health for finding in doctor._backends()}
    assert names["backend fake"] is Health.GOOD


@pytest.mark.parametrize("error", [StoreUnavailable("it is down"), OSError(13, "denied")])
def test_a_store_that_fails_has_a_fix(error):
    async def probe() -> str:
        raise error

    found = doctor._reach("store", probe(), "do this")
    assert found.health is Health.BAD
    assert found.fix == "do this"


def test_the_file_system_of_a_path():
    assert doctor._file_system(Path("/proc/self")) == "proc"
    assert doctor._file_system(Path("/dev/shm")) in {"tmpfs", "shm"}
