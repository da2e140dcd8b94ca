"""The fake: the seam's own example."""

from __future__ import annotations

import pytest

from serverlessllm.backends.fake import Fake
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.testing.contracts.backend import BackendContract

MODEL = ModelId("contract/model")


class FakeHarness:
    backend = stats_backend = Fake()
    spec = ModelSpec(model=MODEL, backend="fake", options={"tokens": "4000", "token_s": "0.001"})
    index = model_path = index_path = None
    refused = (
        (ModelSpec(model=MODEL), None),
        (ModelSpec(model=MODEL, backend="fake", options={"slots": "0"}), None),
        (ModelSpec(model=MODEL, backend="fake", options={"colour": "red"}), None),
    )
    stats_path = "/stats"
    progress_a_token = 1
    logprobs = embeddings = True


class TestFake(BackendContract):
    @pytest.fixture
    def harness(self) -> FakeHarness:
        return FakeHarness()
