"""Trials: what they report is so, and nothing of them is left however they end."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from serverlessllm.cli.doctor import _file_system
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.errors import CheckpointError, CorruptChunk, LoadFailed, OutOfSpace
from serverlessllm.loader.accelerator import DeviceUnavailable
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.trial import dram, measure, place
from serverlessllm.loader.trial.page_cache import cached_share, forget, most
from serverlessllm.loader.trial.place import private_directory
from serverlessllm.testing.accelerator import LateAccelerator

DRAM, NVME, DEVICE, STORE = CacheLevel.DRAM, CacheLevel.NVME, CacheLevel.DEVICE, CacheLevel.STORE


class Stand:
    """A checkpoint in a folder, and where it is measured."""

    def __init__(self, folder: Path, shm: Path, disk: Path) -> None:
        self.index_path = folder / "model.idx"
        self.bin_path = folder / "model.bin"
        self.shm = shm
        self.disk = disk
        self.rounds: list[int] = []

    async def measure(self, source, **more):
        return await measure.measure(
            self.index_path,
            source,
            disk=self.disk,
            settings=LoaderSettings(),
            rounds=2,
            tell=more.pop("tell", self.rounds.append),
            **more,
        )

    def left(self) -> list[Path]:
        return [*self.disk.iterdir(), *self.shm.iterdir()]


@pytest.fixture
async def sample(bench, make_sample):
    return await bench.publish(make_sample("one"))


@pytest.fixture
def at(bench, sample, shm, tmp_path, monkeypatch) -> Stand:
    monkeypatch.setattr(measure, "_SHM", shm)
    disk = tmp_path / "disk"
    disk.mkdir()
    return Stand(bench.store_dir / sample.ref.prefix, shm, disk)


@pytest.mark.parametrize(("source", "hop"), [(STORE, "store→dram"), (NVME, "nvme→dram")])
async def test_from_a_disk(at, sample, source, hop):
    report = await at.measure(source)
    assert (report.hop, report.checkpoint) == (hop, sample.ref.id)
    assert report.size_bytes == sample.ref.size_bytes
    assert at.rounds == [0, 1]
    assert report.rounds == 2
    assert report.share == pytest.approx(report.bytes_s / report.limit_bytes_s)
    assert sum(stage.seconds for stage in report.stages) == pytest.approx(report.seconds)
    assert "verify" in {stage.name for stage in report.stages}
    assert report.verify_share >= 0
    assert report.cpu_s_per_gib > 0
    assert at.left() == []


async def test_what_the_page_cache_held_is_said(at):
    report = await at.measure(STORE)
    if _file_system(at.disk) == "tmpfs":
        assert report.cached_share == 1
    else:
        assert report.cached_share == 0


async def test_a_second_process_copies_nothing(at, sample):
    report = await at.measure(DRAM)
    assert report.hop == "dram→process"
    assert report.copied_bytes == 0
    assert report.verify_share == 0
    assert sum(stage.seconds for stage in report.stages) == pytest.approx(report.seconds)
    assert at.left() == []


async def test_a_second_process_that_fails_is_an_error(at, monkeypatch, capfd):
    monkeypatch.setattr(dram, "_MAPPER", "serverlessllm.loader.trial.none")
    with pytest.raises(LoadFailed, match="did not start"):
        await at.measure(DRAM)
    assert "No module named" in capfd.readouterr().err
    assert at.left() == []


async def test_onto_a_device(at, sample):
    opened = []

    def open_accelerator():
        opened.append(LateAccelerator({0: 1 << 30}))
        return opened[-1]

    report = await at.measure(DEVICE, open_accelerator=open_accelerator)
    assert report.hop == "dram→device"
    assert report.limit_bytes_s > 0
    assert [one.ring for one in opened] == [None, None]
    assert at.left() == []


async def test_no_device_is_said_before_anything_moves(at):
    def none():
        raise DeviceUnavailable("no GPU")

    with pytest.raises(DeviceUnavailable):
        await at.measure(DEVICE, open_accelerator=none)
    assert at.rounds == []
    assert at.left() == []


@pytest.mark.parametrize("source", [STORE, NVME])
async def test_a_damaged_checkpoint_is_an_error(at, source, flip):
    flip(at.bin_path, 100_000)
    with pytest.raises(CorruptChunk):
        await at.measure(source)
    assert at.left() == []


async def test_a_checkpoint_without_its_bytes_is_an_error(at):
    at.bin_path.unlink()
    with pytest.raises((CheckpointError, FileNotFoundError)):
        await at.measure(NVME)
    assert at.left() == []


async def test_no_room_is_said_before_anything_moves(at, monkeypatch):
    full = shutil._ntuple_diskusage(1 << 30, 1 << 30, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(OutOfSpace, match="has only 0 B free"):
        await at.measure(NVME)
    assert at.rounds == []


async def test_no_memory_is_said_before_anything_moves(at, monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\nMemAvailable:    1024 kB\n")
    monkeypatch.setattr(place, "_MEMINFO", tmp_path / "meminfo")
    with pytest.raises(OutOfSpace, match=r"only 1\.0 MiB of memory"):
        await at.measure(NVME)
    assert at.rounds == []


@pytest.mark.parametrize("source", [STORE, NVME, DRAM])
async def test_a_cancelled_one_leaves_nothing(at, source):
    running = asyncio.Event()

    task = asyncio.create_task(at.measure(source, tell=lambda _: running.set()))
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert at.left() == []


async def test_the_checkpoint_itself_is_not_touched(at):
    before = [
        (path.stat().st_mtime_ns, path.stat().st_mode) for path in at.bin_path.parent.iterdir()
    ]
    await at.measure(NVME)
    after = [
        (path.stat().st_mtime_ns, path.stat().st_mode) for path in at.bin_path.parent.iterdir()
    ]
    assert before == after


def test_what_a_killed_one_left_is_removed(tmp_path):
    with private_directory(tmp_path) as live:
        killed = tmp_path / f"{live.name[:-8]}killed"
        killed.mkdir()
        (killed / "file").write_text("x")
        with private_directory(tmp_path) as other:
            assert live.is_dir()
            assert other.is_dir()
            assert not killed.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_page_cache_is_emptied_and_asked(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    assert cached_share(path) == 1
    forget(path)
    if _file_system(tmp_path) != "tmpfs":
        assert cached_share(path) == 0
    path.read_bytes()
    assert cached_share(path) == 1


def test_the_page_cache_of_an_empty_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert cached_share(path) == 0


def test_what_is_not_known_of_one_round_is_not_known():
    assert most([0.25, 0.5]) == 0.5
    assert most([0.25, None]) is None
