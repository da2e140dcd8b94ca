"""A foreign server, started by a command: here, the fake's, on a socket and on a port."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from serverlessllm.backends.fake import Fake
from serverlessllm.backends.openai import OpenAI
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.testing.contracts.backend import BackendContract, started

MODEL = ModelId("contract/model")
SERVER = (sys.executable, "-m", "serverlessllm.backends.inside.fake")
OPTIONS = '{"tokens": 4000, "token_s": 0.001}'


def spec(*command: str, url: str | None = None) -> ModelSpec:
    return ModelSpec(model=MODEL, command=command, url=url)


class OpenAIHarness:
    backend = OpenAI()
    stats_backend = Fake()
    index = model_path = index_path = None
    refused = (
        (spec(), None),
        (spec("server", "${socket}", url="http://127.0.0.1:1"), None),
        (spec("server"), None),
        (spec("server", "${socket}", "${port}"), None),
        (spec("server", "${socket}", "${model_path}"), None),
        (spec("server", "${socket}", "${home}"), None),
        (spec("server", "${socket}", "$HOME"), None),
        (spec(url="https://127.0.0.1"), None),
        (spec(url="http://127.0.0.1/deep/v1"), None),
        (spec(url="http://127.0.0.1:port"), None),
    )
    stats_path = "/stats"
    progress_a_token = 1
    logprobs = embeddings = True

    def __init__(self, listen: str) -> None:
        self.spec = spec(*SERVER, listen, "${model}", OPTIONS)


class TestOpenAI(BackendContract):
    @pytest.fixture
    def harness(self) -> OpenAIHarness:
        return OpenAIHarness("unix:${socket}")


async def test_on_a_port_too(tmp_path: Path) -> None:
    async with started(OpenAIHarness("http://127.0.0.1:${port}"), tmp_path) as backend:
        status, _ = await backend.ask("/v1/completions", {"prompt": "one", "max_tokens": 1})
        assert status == 200
