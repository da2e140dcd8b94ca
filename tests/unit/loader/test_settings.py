"""What the loader takes from the machine when it is told nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from serverlessllm.loader import settings as module
from serverlessllm.loader.settings import (
    default_dram_budget_bytes,
    default_dram_dir,
    default_nvme_budget_bytes,
    memory_bytes,
)


def test_the_dram_dir_belongs_to_the_data_directory(tmp_path: Path) -> None:
    path = default_dram_dir(tmp_path)
    assert path.parent == Path("/dev/shm")
    assert path.name.startswith(f"sllm-{os.getuid()}-")
    assert path == default_dram_dir(tmp_path / "x" / "..")
    assert path != default_dram_dir(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "limit"), [("1048576\n", 1048576), ("max\n", None), ("no", None), (None, None)]
)
def test_a_cgroup_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, limit: int | None
) -> None:
    file = tmp_path / "memory.max"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(module, "_CGROUP_LIMITS", (file,))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory_bytes() == (limit or machine)


def test_budgets_fit_the_file_systems(tmp_path: Path) -> None:
    dram = default_dram_budget_bytes(tmp_path / "not" / "there" / "yet")
    assert 0 < dram <= memory_bytes() // 4
    nvme = tmp_path / "nvme"
    before = default_nvme_budget_bytes(nvme)
    assert before <= shutil.disk_usage(tmp_path).free
    nvme.mkdir()
    (nvme / "held").write_bytes(bytes(1 << 20))
    # What is cached already does not shrink the budget from start to start.
    assert abs(default_nvme_budget_bytes(nvme) - before) < 1 << 28
