"""transformers on a tiny random checkpoint in /dev/shm."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.templates import Templates
from serverlessllm.backends.transformers import Transformers
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import Index, decode_index
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.testing.checkpoints import write_random_safetensors
from serverlessllm.testing.contracts.backend import BackendContract, Running, started

MODEL = ModelId("contract/model")


class TransformersHarness:
    backend = stats_backend = Transformers()
    spec = ModelSpec(model=MODEL, options={"context": "4096", "threads": "1"})
    stats_path = "/stats"
    progress_a_token = 1
    logprobs = embeddings = True

    def __init__(self, bin_path: Path, index_path: Path) -> None:
        self.model_path = bin_path
        self.index_path = index_path
        self.index: Index = decode_index(index_path.read_bytes())
        replace = msgspec.structs.replace
        self.refused = (
            (self.spec, None),
            (self.spec, replace(self.index, kind="gguf")),
            (self.spec, replace(self.index, side_files=())),
            (self.spec, replace(self.index, side_files=self.index.side_files[1:2])),
            (self.spec, replace(self.index, architecture=None)),
            (self.spec, replace(self.index, architecture="EvilForCausalLM")),
            (self.spec, replace(self.index, base="org/base")),
            (ModelSpec(model=MODEL, url="http://127.0.0.1:1"), self.index),
            (ModelSpec(model=MODEL, options={"context": "many"}), self.index),
            (ModelSpec(model=MODEL, options={"turbo": "on"}), self.index),
        )


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[TransformersHarness]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        source = write_random_safetensors(Path(directory) / "hf")
        converted = convert(open_folder(source, model=MODEL), Path(directory))
        yield TransformersHarness(converted.bin_path, converted.idx_path)


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def forking(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Templates]:
    folder = tmp_path_factory.mktemp("template")
    templates = Templates(
        BackendSettings(),
        clock=SystemClock(),
        environ=os.environ,
        run_dir=folder,
        log_dir=folder,
    )
    yield templates
    await templates.close()


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def forked(
    checkpoint: TransformersHarness,
    forking: Templates,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Running]:
    async with started(checkpoint, tmp_path_factory.mktemp("run"), forking) as running:
        yield running


@pytest.mark.asyncio(loop_scope="class")
@pytest.mark.filterwarnings("ignore:The test .* is marked with:pytest.PytestWarning")
class TestTransformers(BackendContract):
    """Forked from one template; those tests that only ask share an instance."""

    @pytest.fixture
    def harness(self, checkpoint: TransformersHarness) -> TransformersHarness:
        return checkpoint

    @pytest.fixture
    def templates(self, forking: Templates) -> Templates:
        return forking

    @pytest.fixture
    def backend(self, forked: Running) -> Running:
        return forked
