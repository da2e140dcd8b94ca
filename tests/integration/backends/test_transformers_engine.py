"""The engine's process, forked and executed: what it answers, and how it begins and ends."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from serverlessllm.backends.base import ALL_ARRIVED, ARRIVALS_FD, WEIGHTS_FD, Launch, Node
from serverlessllm.backends.process import BackendProcess
from serverlessllm.backends.settings import BackendSettings
from serverlessllm.backends.templates import Templates
from serverlessllm.backends.transformers import Transformers
from serverlessllm.checkpoint.convert import Converted, convert
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import LoadFailed
from serverlessllm.core.ids import InstanceId, ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.testing.checkpoints import WORDS, write_random_safetensors
from serverlessllm.testing.waiting import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = ModelId("test/model")
CHAT = "/v1/chat/completions"
JSON = (("content-type", "application/json"),)
CHUNK_BYTES = 16 * 1024
CONTEXT = 256


class Engine:
    """One instance, asked as an agent would."""

    def __init__(self, process: BackendProcess, address: Any, client: Upstreams) -> None:
        self.process = process
        self.address = address
        self.client = client

    async def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        method = "GET" if body is None else "POST"
        sent = b"" if body is None else msgspec.json.encode(body)
        async with self.client.send(self.address, method, path, JSON, sent) as response:
            return response.status, msgspec.json.decode(await response.read())

    async def chat(self, **fields: object) -> Any:
        status, answer = await self.ask(CHAT, chat(**fields))
        assert status == 200, answer
        return answer

    async def stream(self, path: str, body: object) -> list[Any]:
        """The events, without the last `[DONE]`."""
        sent = msgspec.json.encode(body)
        async with self.client.send(self.address, "POST", path, JSON, sent) as response:
            assert response.status == 200
            lines = [line[6:] async for line in response.lines() if line]
        assert lines[-1] == b"[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def chat(**fields: object) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": "the cold model wakes"}],
        "max_tokens": 12,
        "temperature": 0,
    } | fields


def schema(schema: dict[str, object]) -> dict[str, object]:
    """A `response_format`."""
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


ANSWER = {
    "type": "object",
    "properties": {"wakes": {"type": "boolean"}, "kind": {"enum": ["cold", "warm"]}},
    "required": ["wakes", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "wake", "parameters": ANSWER}},
    {"type": "function", "function": {"name": "sleep", "parameters": {"$ref": "#/$defs/time",
     "$defs": {"time": {"type": "object", "properties": {"s": {"enum": [1, 2]}},
     "required": ["s"], "additionalProperties": False}}}}},
]  # fmt: skip


def content(answer: Any, choice: int = 0) -> str:
    text: str = answer["choices"][choice]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Converted]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        source = write_random_safetensors(Path(directory) / "hf", layers=3, dtype="F32")
        yield convert(open_folder(source, model=MODEL), Path(directory), chunk_bytes=CHUNK_BYTES)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def templates(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Templates]:
    folder = tmp_path_factory.mktemp("template")
    templates = Templates(
        BackendSettings(), clock=SystemClock(), environ=os.environ, run_dir=folder, log_dir=folder
    )
    yield templates
    await templates.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[Upstreams]:
    client = Upstreams(UpstreamSettings(), SystemClock())
    yield client
    await client.close()


def start(
    checkpoint: Converted,
    folder: Path,
    client: Upstreams,
    templates: Templates | None,
    descriptors: Mapping[str, int] | None = None,
    context: int = CONTEXT,
) -> Engine:
    run_dir = folder / "run"
    run_dir.mkdir(mode=0o700)
    plan = Transformers().launch(
        Launch(
            instance=InstanceId("i"),
            spec=ModelSpec(model=MODEL, options={"context": str(context), "threads": "1"}),
            index=checkpoint.index,
            model_path=checkpoint.bin_path,
            index_path=checkpoint.idx_path,
            run_dir=run_dir,
            node=Node(cpus=1, dram_free_bytes=1 << 30),
            slots=4,
            arriving=descriptors is not None,
        )
    )
    process = BackendProcess(
        plan,
        run_dir=run_dir,
        log_path=folder / "backend.log",
        environ=os.environ,
        settings=BackendSettings(),
        clock=SystemClock(),
        descriptors=descriptors,
        templates=templates,
    )
    return Engine(process, plan.address, client)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(
    checkpoint: Converted,
    templates: Templates,
    client: Upstreams,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Engine]:
    engine = start(checkpoint, tmp_path_factory.mktemp("engine"), client, templates)
    try:
        await engine.process.wait_ready(client)
        yield engine
    finally:
        await engine.process.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def roomy(
    checkpoint: Converted,
    templates: Templates,
    client: Upstreams,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Engine]:
    """One whose context has room for tools, a byte a token."""
    folder = tmp_path_factory.mktemp("roomy")
    engine = start(checkpoint, folder, client, templates, context=2048)
    try:
        await engine.process.wait_ready(client)
        yield engine
    finally:
        await engine.process.stop()


async def test_greedy_answers_do_not_depend_on_who_else_asks(engine: Engine) -> None:
    prompts = [[{"role": "user", "content": " ".join(WORDS[n : n + 5])}] for n in range(6)]
    alone = [content(await engine.chat(messages=prompt)) for prompt in prompts]
    together = await asyncio.gather(*(engine.chat(messages=prompt) for prompt in prompts))
    assert [content(answer) for answer in together] == alone
    assert len(set(alone)) > 1


async def test_a_stream_says_what_the_whole_answer_says(engine: Engine) -> None:
    whole = await engine.chat()
    events = await engine.stream(CHAT, chat(stream=True, stream_options={"include_usage": True}))
    *chunks, last = events
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == content(whole)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert last["usage"]["completion_tokens"] == 12
    assert last["choices"] == []


async def test_equal_seeds_give_equal_answers(engine: Engine) -> None:
    async def drawn(seed: int | None) -> str:
        return content(await engine.chat(temperature=1.5, seed=seed, max_tokens=24))

    assert await drawn(7) == await drawn(7)
    assert len({await drawn(seed) for seed in (1, 2, 3, None, None)}) > 1


async def test_the_most_unlikely_are_never_drawn(engine: Engine) -> None:
    greedy = content(await engine.chat())
    assert content(await engine.chat(temperature=2, top_k=1)) == greedy
    assert content(await engine.chat(temperature=2, top_p=0)) == greedy


async def test_several_answers_differ_by_their_seed(engine: Engine) -> None:
    answer = await engine.chat(n=3, temperature=1.5, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert content(await engine.chat(temperature=1.5, seed=6)) == content(answer, 1)
    assert answer["usage"]["completion_tokens"] == 36


async def test_a_stop_text_ends_the_answer_and_is_not_said(engine: Engine) -> None:
    text = content(await engine.chat())
    stop = text[len(text) // 2 - 2 : len(text) // 2 + 3]  # across two words, so across two tokens
    answer = await engine.chat(stop=["\n", stop])
    assert content(answer) == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["stop_reason"] == stop
    events = await engine.stream(CHAT, chat(stream=True, stop=stop))
    assert [c["stop_reason"] for e in events for c in e["choices"] if "stop_reason" in c] == [stop]
    streamed = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert streamed == text[: text.index(stop)]


async def test_log_probabilities_are_of_the_tokens_that_are_said(engine: Engine) -> None:
    answer = await engine.chat(logprobs=True, top_logprobs=3)
    scores = answer["choices"][0]["logprobs"]["content"]
    assert "".join(score["token"] for score in scores) == content(answer)
    for score in scores:
        best = score["top_logprobs"][0]
        assert score["logprob"] == best["logprob"] <= 0, "the greedy one is the most likely"
        assert len(score["top_logprobs"]) == 3
        assert bytes(score["bytes"]).decode() == score["token"]


async def test_completions_of_texts_and_of_tokens(engine: Engine) -> None:
    body = {"prompt": ["a red", "two blue"], "max_tokens": 5, "temperature": 0, "echo": True}
    status, answer = await engine.ask("/v1/completions", body)
    assert status == 200
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0].startswith("a red ")
    assert texts[1].startswith("two blue ")
    status, answer = await engine.ask("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2})
    assert (status, answer["usage"]["prompt_tokens"]) == (200, 3)


async def test_a_bias_forbids_a_token(engine: Engine) -> None:
    first = content(await engine.chat(max_tokens=1))
    token = 259 + WORDS.index(first.strip())
    other = await engine.chat(max_tokens=1, logit_bias={str(token): -100})
    assert content(other) != first


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"temperature": 3}, "temperature"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"response_format": {"type": "yaml"}}, "response_format"),
        (CHAT, {"response_format": schema({"type": "no such type"})}, "response_format"),
        (CHAT, {"logit_bias": {"word": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"100000": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": [{"role": "judge", "content": "5"}]}, "messages[0].role"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls",
        ),
        (CHAT, {"stop": ["x"] * 99}, "stop"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": [100_000]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ("/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": ["a"], "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": ["a"] * 9, "n": 99}, "n"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions"),
        ("/v1/detokenize", {"model": "m", "tokens": [100_000]}, "tokens"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_name(
    engine: Engine, path: str, fields: dict[str, object], param: str
) -> None:
    body = chat(**fields) if path == CHAT else fields
    status, answer = await engine.ask(path, body)
    assert status == 400
    assert answer["error"]["param"].startswith(param)
    assert answer["error"]["type"] == "invalid_request_error"


async def test_an_answer_holds_its_schema(engine: Engine) -> None:
    fields = {"response_format": schema(ANSWER), "max_tokens": 60, "temperature": 1, "n": 3}
    answer = await engine.chat(**fields)
    for place in range(3):
        said = json.loads(content(answer, place))
        assert isinstance(said["wakes"], bool)
        assert said["kind"] in {"cold", "warm"}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}


async def test_an_answer_is_an_object_if_it_must_be(engine: Engine) -> None:
    answer = await engine.chat(response_format={"type": "json_object"}, max_tokens=3)
    assert content(answer).startswith("{")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "sleep"}}]
)
async def test_an_answer_is_a_call_if_it_must_be(roomy: Engine, choice: object) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 80, "temperature": 1}
    answer = (await roomy.chat(**asked))["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert answer["message"]["content"] is None
    assert answer["finish_reason"] == "tool_calls"
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "sleep":
        assert arguments["s"] in {1, 2}
    else:
        assert choice == "required"
        assert set(arguments) == {"wakes", "kind"}


async def test_a_call_comes_in_parts_that_make_one(roomy: Engine) -> None:
    asked = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 80, "seed": 3}
    whole = (await roomy.chat(**asked))["choices"][0]["message"]["tool_calls"][0]["function"]
    events = await roomy.stream(CHAT, chat(stream=True, **asked))
    deltas = [event["choices"][0]["delta"] for event in events]
    parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert [part["index"] for part in parts] == [0] * len(parts)
    assert [bool(part.get("id")) for part in parts] == [True] + [False] * (len(parts) - 1)
    assert parts[0]["function"]["name"] == whole["name"]
    assert "".join(part["function"]["arguments"] for part in parts) == whole["arguments"]
    assert not any(delta.get("content") for delta in deltas)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_chat_may_tell_of_calls_and_what_they_returned(roomy: Engine) -> None:
    called = {"id": "c", "type": "function", "function": {"name": "wake", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "wake"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c", "content": "one"},
    ]
    plain = await roomy.chat(messages=messages[:1])
    told = await roomy.chat(messages=messages, tools=TOOLS)
    assert told["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 20
    silent = await roomy.chat(messages=messages[:1], tools=TOOLS, tool_choice="none")
    assert silent["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


async def test_a_prompt_is_scored_as_its_tokens_would_be_if_they_were_answers(
    engine: Engine,
) -> None:
    fields = {"temperature": 0, "logprobs": 2, "max_tokens": 4}
    _, answer = await engine.ask("/v1/completions", {"prompt": [1, 265, 266]} | fields)
    generated = answer["choices"][0]["logprobs"]
    tokens = [WORDS.index(token.strip()) + 259 for token in generated["tokens"]]
    prompt = {"prompt": [1, 265, 266, *tokens], "echo": True}
    _, answer = await engine.ask("/v1/completions", prompt | fields | {"max_tokens": 0})
    (choice,) = answer["choices"]
    scores = choice["logprobs"]
    assert choice["text"].strip() == "wakes sleeps" + "".join(generated["tokens"])
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert scores["token_logprobs"][0] is None
    assert scores["token_logprobs"][3:] == pytest.approx(generated["token_logprobs"], abs=1e-3)
    assert [set(top) for top in scores["top_logprobs"][3:]] == [
        set(top) for top in generated["top_logprobs"]
    ]
    _, answer = await engine.ask("/v1/completions", prompt | fields | {"max_tokens": 2})
    again = answer["choices"][0]
    assert again["text"].startswith(choice["text"])
    assert len(again["logprobs"]["tokens"]) == len(scores["tokens"]) + 2
    assert again["logprobs"]["text_offset"][-1] < len(again["text"])


async def test_the_best_of_several_answers_is_the_likeliest(engine: Engine) -> None:
    asked = {"prompt": "one", "max_tokens": 3, "temperature": 1.5, "seed": 5, "logprobs": 0}
    _, all_ = await engine.ask("/v1/completions", asked | {"n": 4})
    _, best = await engine.ask("/v1/completions", asked | {"n": 2, "best_of": 4})
    means = sorted(sum(c["logprobs"]["token_logprobs"]) for c in all_["choices"])
    chosen = [sum(choice["logprobs"]["token_logprobs"]) for choice in best["choices"]]
    assert chosen == pytest.approx([means[-1], means[-2]], abs=1e-3)
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == all_["usage"]["completion_tokens"]


async def test_unlikely_tokens_are_left_out(engine: Engine) -> None:
    likeliest = content(await engine.chat())
    assert content(await engine.chat(temperature=2, min_p=1)) == likeliest


async def test_tokens_and_back(roomy: Engine) -> None:
    _, text = await roomy.ask("/v1/tokenize", {"prompt": "red", "return_token_strs": True})
    assert text["token_strs"] == ["r", "e", "d"]
    assert text["count"] == len(text["tokens"])
    assert text["max_model_len"] == 2048
    _, back = await roomy.ask("/v1/detokenize", {"model": "m", "tokens": text["tokens"]})
    assert back["prompt"] == "red"
    _, counted = await roomy.ask("/v1/tokenize", {"messages": chat()["messages"], "tools": TOOLS})
    answer = await roomy.chat(tools=TOOLS)
    assert counted["count"] == answer["usage"]["prompt_tokens"]


async def test_embeddings_may_be_shorter(engine: Engine) -> None:
    status, answer = await engine.ask("/v1/embeddings", {"input": "a red", "dimensions": 4})
    assert status == 200
    vector = answer["data"][0]["embedding"]
    assert len(vector) == 4
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-3)


async def test_a_prompt_longer_than_the_context_is_refused(engine: Engine) -> None:
    long = "red " * CONTEXT
    for route, field, prompt in (
        ("chat/completions", "messages", [{"role": "user", "content": long}]),
        ("completions", "prompt", long),
        ("embeddings", "input", long),
    ):
        status, answer = await engine.ask(f"/v1/{route}", {field: prompt})
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert answer["error"]["param"] == field


async def test_an_answer_ends_with_the_context(engine: Engine) -> None:
    answer = await engine.chat(max_tokens=100_000)
    assert answer["usage"]["total_tokens"] == CONTEXT
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_requests_that_outgrow_the_cache_together_are_answered_all(engine: Engine) -> None:
    answers = await asyncio.gather(
        *(engine.chat(max_tokens=120, seed=n, temperature=1) for n in range(4))
    )
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [120] * 4


async def test_embeddings_between_the_tokens_of_an_answer(engine: Engine) -> None:
    answering = asyncio.ensure_future(engine.chat(max_tokens=100))
    status, answer = await engine.ask("/v1/embeddings", {"input": ["a red", "a red", "blue"]})
    assert status == 200
    first, again, other = (row["embedding"] for row in answer["data"])
    assert first == again != other
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-3)
    assert (await answering)["usage"]["completion_tokens"] == 100


async def test_unknown_routes_and_methods(engine: Engine) -> None:
    assert (await engine.ask("/v1/nothing", {}))[0] == 404
    assert (await engine.ask(CHAT))[0] == 405


async def test_executed_it_answers_as_when_forked(
    checkpoint: Converted, client: Upstreams, engine: Engine, tmp_path: Path
) -> None:
    executed = start(checkpoint, tmp_path, client, None)
    try:
        await executed.process.wait_ready(client)
        assert content(await executed.chat()) == content(await engine.chat())
    finally:
        await executed.process.stop()
    assert executed.process.exited.result() == 0


class Arriving:
    """The agent's ends: a file that fills, and a pipe that tells."""

    def __init__(self, checkpoint: Converted, folder: Path) -> None:
        self._index = checkpoint.index
        self._source = checkpoint.bin_path.read_bytes()
        path = folder / "model.bin.partial"
        path.write_bytes(bytes(len(self._source)))
        self._file = os.open(path, os.O_RDWR)
        self.weights = os.open(path, os.O_RDONLY)
        path.unlink()
        self.told, self._pipe = os.pipe()

    @property
    def descriptors(self) -> dict[str, int]:
        return {WEIGHTS_FD: self.weights, ARRIVALS_FD: self.told}

    def lent(self) -> None:
        """The engine has its own now."""
        os.close(self.weights)
        os.close(self.told)

    def side_chunks(self) -> list[int]:
        first = self._index.side_files[0].offset // CHUNK_BYTES
        return list(range(first, len(self._index.chunks)))

    def bring(self, numbers: list[int]) -> None:
        for number in numbers:
            offset, size = self._index.chunk_range(number)
            os.pwrite(self._file, self._source[offset : offset + size], offset)
        os.write(self._pipe, struct.pack(f"<{len(numbers)}I", *numbers))

    def end(self, *, whole: bool) -> None:
        if whole:
            os.write(self._pipe, struct.pack("<I", ALL_ARRIVED))
        os.close(self._pipe)
        os.close(self._file)


async def test_it_is_ready_and_computes_before_its_weights_are_whole(
    checkpoint: Converted, templates: Templates, client: Upstreams, engine: Engine, tmp_path: Path
) -> None:
    arriving = Arriving(checkpoint, tmp_path)
    early = start(checkpoint, tmp_path, client, templates, arriving.descriptors)
    try:
        arriving.bring(arriving.side_chunks())
        await early.process.wait_ready(client)
        arriving.lent()
        asking = asyncio.ensure_future(early.chat())
        *first, last = range(arriving.side_chunks()[0])
        arriving.bring(first)

        async def layers() -> list[str]:
            _, trace = await early.ask("/trace")
            return [layer["layer"] for layer in trace["layers"]]

        async def has_begun() -> bool:
            return "model.layers.0" in await layers()

        await eventually(has_begun)
        assert not asking.done()
        arriving.bring([last])
        arriving.end(whole=True)
        assert content(await asking) == content(await engine.chat())
        _, trace = await early.ask("/trace")
        began_s = {layer["layer"]: layer["computed_at_s"] for layer in trace["layers"]}
        assert began_s["model.layers.0"] < trace["chunks"][str(last)]
        assert len(trace["chunks"]) == len(checkpoint.index.chunks)
    finally:
        await early.process.stop()


async def test_a_load_that_fails_ends_the_engine(
    checkpoint: Converted, templates: Templates, client: Upstreams, tmp_path: Path
) -> None:
    arriving = Arriving(checkpoint, tmp_path)
    early = start(checkpoint, tmp_path, client, templates, arriving.descriptors)
    try:
        arriving.bring(arriving.side_chunks())
        await early.process.wait_ready(client)
        arriving.lent()
        arriving.end(whole=False)
        assert await early.process.exited == 3
        assert "not all of it arrived" in early.process.log_tail[-1]
    finally:
        await early.process.stop()


async def test_a_checkpoint_that_cannot_be_built_says_why(
    checkpoint: Converted, templates: Templates, client: Upstreams, tmp_path: Path
) -> None:
    bad = msgspec.structs.replace(checkpoint.index, architecture="NoneForCausalLM")
    path = tmp_path / "model.idx"
    path.write_bytes(msgspec.json.encode(bad))
    broken = start(msgspec.structs.replace(checkpoint, idx_path=path), tmp_path, client, templates)
    try:
        with pytest.raises(LoadFailed, match="ended with status 1"):
            await broken.process.wait_ready(client)
        assert "has no 'NoneForCausalLM'" in broken.process.log_tail[-1]
    finally:
        await broken.process.stop()
