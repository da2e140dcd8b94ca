"""Requests that the API allows and llama.cpp's server fails on: put as it takes them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serverlessllm.backends.dialect import Ask, Operation
from serverlessllm.backends.llamacpp_dialect import LlamaDialect
from serverlessllm.backends.llamacpp_requests import Continued, takeable, without_nulls
from serverlessllm.core.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}


def taken(*messages: object, **fields: object) -> Any:
    body = {"messages": messages or [USER]} | fields
    return json.loads(takeable(json.dumps(body).encode()))


def calling(arguments: str) -> dict[str, object]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}


def test_what_is_null_is_left_out() -> None:
    function = {"name": "f", "description": None, "parameters": None, "strict": None}
    body = taken(
        USER | {"name": None},
        {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None},
        tools=[{"type": "function", "function": function}],
        stop=None,
    )
    assert body == {
        "messages": [USER, {"role": "assistant", "content": "a"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    assert json.loads(without_nulls(b'{"input":"x","encoding_format":null}')) == {"input": "x"}


def test_nulls_in_a_schema_stay() -> None:
    parameters = {"properties": {"a": {"default": None, "enum": [None, 1]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert taken(tools=[tool])["tools"] == [tool]


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ('{"a": 1}', {"a": 1}),
        ("", {}),
        (" ", {}),
        ('{"a": ', {"arguments": '{"a": '}),
        ("[1]", {"arguments": "[1]"}),
    ],
)
def test_a_calls_arguments_are_an_object(said: str, arguments: object) -> None:
    (message,) = taken(calling(said))["messages"]
    assert message["content"] is None
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == arguments


def test_a_refusal_is_what_the_model_said() -> None:
    part = {"type": "refusal", "refusal": "no"}
    messages = taken(
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "assistant", "content": [part]},
    )["messages"]
    assert [message["content"] for message in messages] == ["no", [{"type": "text", "text": "no"}]]


def test_no_alternatives_of_no_log_probabilities() -> None:
    assert "top_logprobs" not in taken(logprobs=False, top_logprobs=0)
    assert taken(logprobs=True, top_logprobs=2)["top_logprobs"] == 2


@pytest.mark.parametrize(
    ("param", "value"), [("modalities", ["text", "audio"]), ("web_search_options", {})]
)
def test_what_no_engine_here_does_is_refused(param: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        taken(**{param: value})
    assert refused.value.param == param
    assert taken(**{param: None}) == {"messages": [USER]}


def test_text_alone_is_no_other_modality() -> None:
    assert taken(modalities=["text"])["modalities"] == ["text"]


class Repeating:
    """Answers as the server does: with the beginning that it was given."""

    async def ask(self, path: str, body: bytes) -> bytes:
        begun = json.loads(body)["messages"][-1]["content"]
        text = begun if isinstance(begun, str) else begun[0]["text"]
        return json.dumps({"choices": [{"message": {"content": f"{text} done"}}]}).encode()

    async def get(self, path: str) -> bytes:
        raise AssertionError(path)

    async def stream(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        yield await self.ask(path, body)


@pytest.mark.parametrize("content", ["Well,", [{"type": "text", "text": "Well,"}]])
async def test_of_an_answer_that_was_begun_only_the_rest_is_told(content: object) -> None:
    dialect = LlamaDialect(embeddings=True, rerank=False, scored_tokens_max=4, slots=2)
    asked = {
        "messages": [USER, {"role": "assistant", "content": content}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    chat = dialect.translate(Operation.CHAT, json.dumps(asked).encode())
    assert isinstance(chat, Continued)
    (piece,) = [piece async for piece in chat(Repeating())]
    assert json.loads(piece)["choices"][0]["message"]["content"] == " done"
    streamed = dialect.translate(Operation.CHAT, json.dumps(asked | {"stream": True}).encode())
    assert isinstance(streamed, Ask)


class Wordless:
    """Has no token for a text without words."""

    async def ask(self, path: str, body: bytes) -> bytes:
        assert path == "/tokenize"
        return b'{"tokens":[]}'

    async def get(self, path: str) -> bytes:
        raise AssertionError(path)

    async def stream(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        yield await self.ask(path, body)


@pytest.mark.parametrize("prompt", ["", ["", "a"]])
async def test_an_empty_prompt_needs_a_token_that_begins_a_text(prompt: object) -> None:
    dialect = LlamaDialect(embeddings=True, rerank=False, scored_tokens_max=4, slots=2)
    asked = json.dumps({"prompt": prompt, "stream": True}).encode()
    texts = dialect.translate(Operation.COMPLETIONS, asked)
    assert not isinstance(texts, Ask)
    with pytest.raises(InvalidRequest) as refused:
        _ = [piece async for piece in texts(Wordless())]
    assert refused.value.param == "prompt"
