"""What llama.cpp is made to answer, through the agent's code: on a real model whose constraints
are the engine's own, and on tiny ones that rank documents and fill gaps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from serverlessllm.backends.llamacpp import LlamaCpp
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources.base import open_file
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.compatibility.asking import Client, Refused
from serverlessllm.testing.compatibility.engines import Engine
from serverlessllm.testing.contracts.backend import started
from serverlessllm.testing.hf import demo_gguf

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = ModelId("contract/model")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def llama(source: Path, folder: Path, **options: str) -> Engine:
    done = convert(open_file(source, model=MODEL), folder)
    return Engine(
        backend=LlamaCpp(),
        spec=ModelSpec(model=MODEL, options={"context": "2048", "threads": "1"} | options),
        index=done.index,
        model_path=done.bin_path,
        index_path=done.idx_path,
    )


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def smol(folder: Path) -> AsyncIterator[Client]:
    """SmolLM2-135M, whose chat template knows no tools."""
    (folder / "smol").mkdir()
    async with started(llama(demo_gguf(), folder / "smol"), folder / "smol") as running:
        yield Client(running)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny(folder: Path) -> AsyncIterator[Client]:
    """Random, with marks for a gap; scores few tokens of a prompt."""
    (folder / "tiny").mkdir()
    gguf = write_random_gguf(folder / "tiny" / "gaps.gguf", gaps=True)
    engine = llama(gguf, folder / "tiny", scored_tokens_max="8")
    async with started(engine, folder / "tiny") as running:
        yield Client(running)


def asked(city: str) -> dict[str, object]:
    return {"role": "user", "content": f"What is the weather in {city}?"}


def called(city: str) -> dict[str, object]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    call = {"id": f"call_{city}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


CHAT = [asked("Rome"), called("Rome"), asked("Paris"), called("Paris"), asked("Rome")]
"""Examples enough that the smallest model calls by itself."""


async def test_a_model_calls_by_itself_when_it_was_told_of_tools(smol: Client) -> None:
    fields = {"messages": CHAT, "tools": [WEATHER], "max_tokens": 60}
    choice = (await smol.chat(**fields))["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in {"Paris", "Rome"}
    assert choice["finish_reason"] == "tool_calls"
    chunks = await smol.chat(**fields, stream=True)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    parts = [part for delta in deltas for part in delta.get("tool_calls") or ()]
    assert parts[0]["function"]["name"] == "get_weather"
    arguments = "".join(part["function"].get("arguments") or "" for part in parts)
    assert json.loads(arguments)["city"] in {"Paris", "Rome"}


async def test_a_forced_call_is_the_function_that_was_named(smol: Client) -> None:
    other = {"type": "function", "function": {"name": "sing"}}
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = await smol.chat(
        messages=[asked("Paris")], tools=[other, WEATHER], tool_choice=named, max_tokens=80
    )
    choice = answer["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in {"Paris", "Rome"}
    assert choice["message"]["content"] is None


async def test_an_answer_holds_its_schema(smol: Client) -> None:
    schema = WEATHER["function"]["parameters"]  # type: ignore[index]
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    for _ in range(2):  # the first finds out that the engine's own constraints hold here
        text = await smol.say(messages=[asked("Paris")], response_format=form, max_tokens=60)
        assert json.loads(text)["city"] in {"Paris", "Rome"}


async def test_pieces_of_characters_are_scored_too(smol: Client) -> None:
    """Four tokens make this character, and the engine itself tells nothing of three of them."""
    scored = await smol.complete(
        prompt="a \N{DROMEDARY CAMEL}", echo=True, logprobs=2, max_tokens=0
    )
    scores = scored["choices"][0]["logprobs"]
    assert len(scores["tokens"]) == scored["usage"]["prompt_tokens"] > 3
    assert all(-100 < logprob < 0 for logprob in scores["token_logprobs"][1:])


async def test_a_gap_is_filled(tiny: Client) -> None:
    answer = await tiny.complete(prompt="one", suffix=" two", n=2, seed=1, logprobs=1)
    assert [len(c["logprobs"]["tokens"]) for c in answer["choices"]] == [4, 4]
    assert answer["usage"]["completion_tokens"] == 8
    chunks = await tiny.complete(prompt="one", suffix=" two", stream=True)
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert len("".join(texts).split()) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_longer_than_the_context_is_refused_by_name(
    tiny: Client, stream: bool
) -> None:
    for refused, field in (
        (tiny.chat(messages=[asked("x " * 3000)], stream=stream), "messages"),
        (tiny.complete(prompt=[265] * 3000, stream=stream), "prompt"),
    ):
        with pytest.raises(Refused) as told:
            await refused
        error = told.value.error
        assert (error.code, error.param) == ("context_length_exceeded", field)


async def test_too_long_a_prompt_is_not_scored(tiny: Client) -> None:
    with pytest.raises(Refused, match="scored_tokens_max"):
        await tiny.complete(prompt=[265] * 9, echo=True, logprobs=0)


async def test_a_schema_is_held_to_where_the_engine_itself_fails(tiny: Client) -> None:
    """The tiny model's tokens are not spelled as they read."""
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "list": {"type": "array", "items": {"$ref": "#/$defs/one"}, "minItems": 2,
                     "maxItems": 3},
            "maybe": {"type": ["boolean", "null"]},
        },
        "required": ["list"],
        "additionalProperties": False,
        "$defs": {"one": {"anyOf": [{"enum": ["x", 1]}, {"type": "boolean"}]}},
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(3):
        text = await tiny.say(response_format=form, max_tokens=150, temperature=1, seed=seed)
        said = json.loads(text)
        assert 2 <= len(said["list"]) <= 3
        assert said.keys() <= {"list", "maybe"}


async def test_a_schema_that_cannot_be_held_to_is_refused(tiny: Client) -> None:
    schema = {"type": "string", "pattern": "a+"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(Refused, match="pattern"):
        await tiny.chat(response_format=form)


async def test_documents_are_ranked_by_a_reranker(folder: Path) -> None:
    (folder / "rank").mkdir()
    gguf = write_random_gguf(folder / "rank" / "rank.gguf")
    engine = llama(gguf, folder / "rank", rerank="true")
    async with started(engine, folder / "rank") as running:
        client = Client(running)
        documents: list[object] = ["red", {"text": "one two"}, "blue"]
        request: dict[str, object] = {"query": "one", "documents": documents, "top_n": 2}
        answer = await client.post("/v1/rerank", request | {"return_documents": True})
        first, second = answer["results"]
        assert first["relevance_score"] >= second["relevance_score"]
        texts = ["red", "one two", "blue"]
        assert first["document"] == {"text": texts[first["index"]]}
        assert answer["usage"]["prompt_tokens"] > 0
        with pytest.raises(Refused, match="/v1/chat/completions"):
            await client.chat()
