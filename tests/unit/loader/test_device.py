"""GPUs that are not there: said clearly, and nothing imported for a node that has none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from serverlessllm.loader.accelerator import DeviceUnavailable
from serverlessllm.loader.device import Opened, open_accelerator
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.weights import DeviceHandle

CUDA = LoaderSettings(device="cuda")


def test_a_cpu_needs_no_accelerator() -> None:
    assert open_accelerator(LoaderSettings()) is None


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceUnavailable, match=r"serverlessllm\[torch\]"):
        open_accelerator(CUDA)


def test_without_a_gpu_the_driver_and_the_build_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="nvidia-smi") as refusal:
        open_accelerator(CUDA)
    assert refusal.value.permanent
    with pytest.raises(DeviceUnavailable):
        Opened(DeviceHandle(parts=()))


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceUnavailable, match="GPU 2, but this machine has 2"):
        open_accelerator(LoaderSettings(device="cuda", device_numbers=(0, 2)))


def test_an_agent_of_a_cpu_imports_no_engine() -> None:
    code = (
        "import sys; import serverlessllm.bootstrap; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
