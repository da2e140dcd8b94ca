"""What every backend must do; an adapter's own test file only builds the harness.

A real process is started for each test, on a unix socket or a port of this machine, and asked
over HTTP, as an agent would; and through an agent's own code, where the answers must be strictly
what the API says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from serverlessllm.agent.instance import Instance
from serverlessllm.agent.serving import Serving, read_form
from serverlessllm.agent.settings import AgentSettings
from serverlessllm.backends.base import (
    Backend,
    BackendStats,
    Launch,
    LaunchPlan,
    Node,
    Offer,
    Refusal,
)
from serverlessllm.backends.process import BackendProcess
from serverlessllm.backends.procfs import session_members
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.templates import Templates
from serverlessllm.checkpoint.index import Index
from serverlessllm.core.agentapi import USAGE_HEADER
from serverlessllm.core.clock import Clock, SystemClock
from serverlessllm.core.ids import Address, InstanceId
from serverlessllm.core.models import ModelSpec
from serverlessllm.edge.server import EdgeServer, Request
from serverlessllm.edge.settings import EdgeSettings, UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.openai.errors import render_error
from serverlessllm.testing.descriptors import open_descriptors
from serverlessllm.testing.strict import check_stream, check_whole
from serverlessllm.testing.waiting import eventually

NODE = Node(cpus=1, dram_free_bytes=1 << 32)
LOOK_S = 1.2
"""Between two looks whether a generation has ended: llama.cpp puts its own look for departed
clients off by a second whenever it answers anybody."""
LONG_TOKENS = 3900
_JSON = (("content-type", "application/json"),)


class BackendHarness(Protocol):
    """What a test file knows of its backend."""

    @property
    def backend(self) -> Backend: ...

    @property
    def spec(self) -> ModelSpec:
        """A model that it serves; an answer may have `LONG_TOKENS`, and then takes seconds."""
        ...

    @property
    def index(self) -> Index | None: ...

    @property
    def model_path(self) -> Path | None: ...

    @property
    def index_path(self) -> Path | None: ...

    @property
    def refused(self) -> tuple[tuple[ModelSpec, Index | None], ...]:
        """Models that it must refuse."""
        ...

    @property
    def stats_path(self) -> str:
        """Where this server tells its figures, read by `stats_backend`."""
        ...

    @property
    def stats_backend(self) -> Backend: ...

    @property
    def progress_a_token(self) -> int:
        """By how much a token moves its figure of progress, at least."""
        ...

    @property
    def logprobs(self) -> bool: ...

    @property
    def embeddings(self) -> bool: ...


class Running:
    """A started backend, and a client of it."""

    def __init__(
        self,
        harness: BackendHarness,
        plan: LaunchPlan,
        process: BackendProcess,
        client: Upstreams,
        served: Address,
    ) -> None:
        self._harness = harness
        self.served = served
        """Where an agent's code answers for it."""
        self.plan = plan
        self.process = process
        self.client = client

    async def ask(self, path: str, body: object, method: str = "POST") -> tuple[int, Any]:
        """Status and decoded body; `body` may be raw bytes."""
        sent = body if isinstance(body, bytes) else msgspec.json.encode(body)
        async with self.client.send(self.plan.address, method, path, _JSON, sent) as response:
            return response.status, msgspec.json.decode(await response.read())

    async def stream(self, path: str, body: object) -> list[str]:
        """The data of every event."""
        async with self.client.send(
            self.plan.address, "POST", path, _JSON, msgspec.json.encode(body)
        ) as response:
            assert response.status == 200
            assert (response.headers.get("content-type") or "").startswith("text/event-stream")
            lines = [line async for line in response.lines()]
        return [line[6:].decode() for line in lines if line.startswith(b"data: ")]

    async def strict(self, path: str, body: dict[str, object]) -> Any:
        """What a client of an agent gets, proven to be what the API says: a whole answer, or the
        chunks of a stream. The counts of tokens are told to the orchestrator, too."""
        sent = msgspec.json.encode(body)
        asked = read_form(path, sent)
        assert asked is not None
        async with self.client.send(self.served, "POST", path, _JSON, sent) as response:
            got = await response.read()
            assert response.status == 200, got
            told = response.headers.get(USAGE_HEADER) or response.link.trailers.decode()
        assert [int(count) >= 0 for count in told.split()[-2:]] == [True, True]
        if not asked.stream:
            return check_whole(asked, got)
        events = [event.removeprefix("data: ") for event in got.decode().split("\n\n") if event]
        return check_stream(asked, events)

    async def stats(self) -> BackendStats:
        """The engine's own figures."""
        async with self.client.send(self.plan.address, "GET", self._harness.stats_path) as response:
            return self._harness.stats_backend.parse_stats(await response.read())

    async def begun(self) -> None:
        """Return when it works on a request."""

        async def works() -> bool:
            return (await self.stats()).running == 1

        await eventually(works)


@contextlib.asynccontextmanager
async def started(
    harness: BackendHarness, directory: Path, templates: Templates | None = None
) -> AsyncIterator[Running]:
    """Start the harness's model in a fresh run directory, by `templates` if there are any; stop it
    at the end."""
    run_dir = directory / "run"
    run_dir.mkdir(mode=0o700)
    clock, settings = SystemClock(), BackendSettings()
    offer = harness.backend.can_serve(harness.spec, harness.index, NODE)
    assert isinstance(offer, Offer), offer
    plan = harness.backend.launch(
        Launch(
            instance=InstanceId("contract"),
            spec=harness.spec,
            index=harness.index,
            model_path=harness.model_path,
            index_path=harness.index_path,
            run_dir=run_dir,
            node=NODE,
            slots=offer.slots,
        )
    )
    client = Upstreams(UpstreamSettings(), clock)
    process = BackendProcess(
        plan,
        run_dir=run_dir,
        log_path=directory / "backend.log",
        environ=os.environ,
        settings=settings,
        clock=clock,
        templates=templates,
    )
    served = _server(harness, plan, client, clock)
    try:
        await process.wait_ready(client)
        address = Address(f"unix:{directory}/a.sock")
        await served.start(address)
        yield Running(harness, plan, process, client, address)
    finally:
        await served.close()
        await process.stop()
        await client.close()


def _server(
    harness: BackendHarness, plan: LaunchPlan, client: Upstreams, clock: Clock
) -> EdgeServer:
    """An agent with nothing but this instance."""
    instance = Instance(
        InstanceId("contract"),
        harness.spec,
        None,
        keep_alive_s=0.0,
        now_s=0.0,
        not_before_s=0.0,
        on_change=lambda: None,
    )
    instance.backend, instance.plan = harness.backend, plan
    serving = Serving(client, AgentSettings())

    async def serve(request: Request) -> None:
        body = await request.body()
        await serving.serve(request, instance, body, read_form(request.path, body))

    return EdgeServer(serve, EdgeSettings(drain_accept_s=0.0), render_error, clock)


def _chat(**fields: object) -> dict[str, object]:
    return {
        "model": "contract/model",
        "messages": [{"role": "user", "content": "What is 2+2?"}],
        "max_tokens": 8,
    } | fields


class BackendContract:
    """Subclass with a `harness` fixture."""

    @pytest.fixture
    def templates(self) -> Templates | None:
        """Ready ones, for a backend whose instances are to be forked."""
        return None

    @pytest.fixture
    async def backend(
        self, harness: BackendHarness, templates: Templates | None, tmp_path: Path
    ) -> AsyncIterator[Running]:
        async with started(harness, tmp_path, templates) as running:
            yield running

    def test_it_says_what_it_costs(self, harness: BackendHarness) -> None:
        assert harness.backend.installed() is None
        offer = harness.backend.can_serve(harness.spec, harness.index, NODE)
        assert isinstance(offer, Offer)
        assert offer.slots >= 1
        assert offer.memory_bytes >= 0

    def test_what_it_cannot_serve_it_refuses_with_a_reason(self, harness: BackendHarness) -> None:
        for spec, index in harness.refused:
            refusal = harness.backend.can_serve(spec, index, NODE)
            assert isinstance(refusal, Refusal)
            assert len(refusal.reason) > 10

    async def test_chat(self, backend: Running) -> None:
        status, answer = await backend.ask("/v1/chat/completions", _chat())
        assert status == 200
        assert answer["object"] == "chat.completion"
        choice = answer["choices"][0]
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"]
        assert choice["finish_reason"] in {"stop", "length"}
        usage = answer["usage"]
        assert 1 <= usage["completion_tokens"] <= 8
        assert usage["prompt_tokens"] > 0
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    async def test_completion(self, backend: Running) -> None:
        status, answer = await backend.ask(
            "/v1/completions", {"model": "m", "prompt": "one two", "max_tokens": 4}
        )
        assert status == 200
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"]

    async def test_stream(self, backend: Running) -> None:
        *events, done = await backend.stream(
            "/v1/chat/completions", _chat(stream=True, stream_options={"include_usage": True})
        )
        assert done == "[DONE]"
        chunks = [msgspec.json.decode(event) for event in events]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        assert "".join(choice["delta"].get("content") or "" for choice in choices)
        assert choices[-1]["finish_reason"] in {"stop", "length"}
        assert [chunk["usage"] for chunk in chunks if chunk.get("usage")][-1]["total_tokens"] > 1

    @pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
    async def test_answers_are_strictly_what_the_api_says(
        self, backend: Running, harness: BackendHarness, path: str
    ) -> None:
        chat = path.startswith("/v1/chat")
        asked = _chat() if chat else {"model": "alias", "prompt": "one two", "max_tokens": 4}
        whole = await backend.strict(path, asked)
        usage = {"stream_options": {"include_usage": True}}
        chunks = await backend.strict(path, asked | {"stream": True} | usage)
        assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        await backend.strict(path, asked | {"stream": True})
        if not harness.logprobs:
            return
        scored = asked | ({"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1})
        scores = (await backend.strict(path, scored))["choices"][0]["logprobs"]
        assert scores["content" if chat else "tokens"]
        chunks = await backend.strict(path, scored | {"stream": True})
        assert any(chunk["choices"][0]["logprobs"] for chunk in chunks)

    async def test_embeddings_in_either_encoding(
        self, backend: Running, harness: BackendHarness
    ) -> None:
        if harness.embeddings:
            asked: dict[str, object] = {"model": "alias", "input": ["one two", "three"]}
            for encoding in ("float", "base64"):
                answer = await backend.strict(
                    "/v1/embeddings", asked | {"encoding_format": encoding}
                )
                assert len(answer["data"]) == 2

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_client_that_leaves_ends_its_generation(
        self, backend: Running, harness: BackendHarness, stream: bool
    ) -> None:
        body = msgspec.json.encode(_chat(stream=stream, max_tokens=LONG_TOKENS))

        async def ask() -> None:
            async with backend.client.send(
                backend.plan.address, "POST", "/v1/chat/completions", _JSON, body
            ) as response:
                await response.read()

        asking = asyncio.ensure_future(ask())
        try:
            await backend.begun()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        async def ended() -> bool:
            await asyncio.sleep(LOOK_S)
            return (await backend.stats()).running == 0

        await eventually(ended)
        progress = (await backend.stats()).progress
        assert progress is not None
        assert progress < LONG_TOKENS * harness.progress_a_token

    @pytest.mark.parametrize(
        "body",
        [b"{not json", b'"text"', b"{}", b'{"messages": 5}'],
    )
    async def test_bad_input_is_a_4xx_in_json(self, backend: Running, body: bytes) -> None:
        status, answer = await backend.ask("/v1/chat/completions", body)
        assert 400 <= status < 500
        assert answer["error"]["message"]
        status, _ = await backend.ask("/v1/chat/completions", _chat())
        assert status == 200

    async def test_logprobs_if_offered(self, backend: Running, harness: BackendHarness) -> None:
        status, answer = await backend.ask("/v1/chat/completions", _chat(logprobs=True))
        assert status == 200
        scores = answer["choices"][0].get("logprobs")
        if harness.logprobs:
            assert all(token["logprob"] <= 0 for token in scores["content"])
        else:
            assert not scores

    async def test_embeddings_if_offered(self, backend: Running, harness: BackendHarness) -> None:
        status, answer = await backend.ask(
            "/v1/embeddings", {"model": "m", "input": ["one two", "three"]}
        )
        if not harness.embeddings:
            assert status >= 400
            return
        assert status == 200
        first, second = (row["embedding"] for row in answer["data"])
        assert len(first) == len(second) > 0
        assert first != second

    async def test_its_figures(self, backend: Running) -> None:
        for _ in range(2):  # the same prompt twice: the second finds it in the cache
            await backend.ask("/v1/chat/completions", _chat())
        stats = await backend.stats()
        assert stats.running == stats.queued == 0
        assert 0 < stats.kv_hit_rate < 1
        assert stats.progress is None or stats.progress > 0

    async def test_starting_and_stopping_leaks_nothing(
        self, harness: BackendHarness, templates: Templates | None, tmp_path: Path
    ) -> None:
        descriptors: frozenset[str] = frozenset()
        for number in range(3):
            async with started(harness, tmp_path, templates) as running:
                pid = running.process.pid
                status, _ = await running.ask("/v1/chat/completions", _chat())
                assert status == 200
            assert list(session_members(pid)) == []
            assert not (tmp_path / "run").exists()
            if number == 0:
                descriptors = open_descriptors()  # a template that all tests share has begun by now
        assert open_descriptors() <= descriptors
