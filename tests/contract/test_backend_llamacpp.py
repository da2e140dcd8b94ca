"""llama.cpp on a tiny random GGUF in /dev/shm."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from serverlessllm.backends.llamacpp import LlamaCpp
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import Index, decode_index
from serverlessllm.checkpoint.sources.base import open_file
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.contracts.backend import BackendContract

MODEL = ModelId("contract/model")


class LlamaHarness:
    backend = stats_backend = LlamaCpp()
    spec = ModelSpec(model=MODEL, options={"context": "4096"})
    stats_path = "/metrics"
    progress_a_token = 2
    logprobs = embeddings = True

    def __init__(self, bin_path: Path, index_path: Path) -> None:
        self.model_path = bin_path
        self.index_path = index_path
        self.index: Index = decode_index(index_path.read_bytes())
        other = msgspec.structs.replace(self.index, kind="tensors")
        self.refused = (
            (self.spec, None),
            (self.spec, other),
            (ModelSpec(model=MODEL, url="http://127.0.0.1:1"), self.index),
            (ModelSpec(model=MODEL, options={"context": "many"}), self.index),
            (ModelSpec(model=MODEL, options={"turbo": "on"}), self.index),
        )


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[LlamaHarness]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        folder = Path(directory)
        gguf = write_random_gguf(folder / "random.gguf", layers=8, width=128)
        converted = convert(open_file(gguf, model=MODEL), folder)
        yield LlamaHarness(converted.bin_path, converted.idx_path)


class TestLlamaCpp(BackendContract):
    @pytest.fixture
    def harness(self, checkpoint: LlamaHarness) -> LlamaHarness:
        return checkpoint
