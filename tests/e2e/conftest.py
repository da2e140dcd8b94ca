"""One running system for all tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.management import register
from serverlessllm.testing.processes import data_directory, sllm


class Server(NamedTuple):
    """`sllm serve` with `tiny` (random weights in llama.cpp; alias `t`) and `fake`."""

    url: str
    data_dir: Path
    log: Path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a megabyte of random weights that llama.cpp really runs."""
    return write_random_gguf(tmp_path_factory.mktemp("weights") / "tiny.gguf")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Server]:
    with (
        data_directory(tmp_path_factory.mktemp("serve")) as directory,
        sllm("serve", "--port", "0", data_dir=directory) as running,
    ):
        register(
            running.address,
            model="tiny",
            source=weights.as_uri(),
            backend="llamacpp",
            aliases=["t"],
        )
        register(running.address, model="fake", backend="fake")
        yield Server(running.address, directory, running.log)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    with data_directory(tmp_path) as directory:
        yield directory
