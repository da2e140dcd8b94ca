"""How requests are put to engines that speak the API in part: decided without any engine."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest

from serverlessllm.backends.dialect import (
    GENERATION,
    Ask,
    Composed,
    Operation,
    PlainDialect,
    check_operation,
    dialect_of,
)
from serverlessllm.backends.fake import Fake
from serverlessllm.backends.llamacpp import LlamaCpp
from serverlessllm.backends.llamacpp_dialect import LlamaDialect
from serverlessllm.backends.openai import OpenAI
from serverlessllm.backends.transformers import Transformers
from serverlessllm.core.errors import (
    BackendProtocolError,
    InvalidRequest,
    SLLMError,
    UnsupportedOperation,
)
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec

MODEL = ModelId("test/model")
TOOL = {"type": "function", "function": {"name": "f"}}
MESSAGES = [{"role": "user", "content": "hi"}]


class Script:
    """An engine that answers by path, and remembers what it was asked."""

    def __init__(self, answers: Mapping[str, object]) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._answers = answers

    async def ask(self, path: str, body: bytes) -> bytes:
        self.asked.append((path, json.loads(body)))
        answer = self._answers[path]
        if isinstance(answer, SLLMError):
            raise answer
        return json.dumps(answer).encode()

    async def get(self, path: str) -> bytes:
        return json.dumps(self._answers[path]).encode()

    async def stream(self, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        self.asked.append((path, json.loads(body)))
        events = self._answers[path]
        if isinstance(events, SLLMError):
            raise events
        assert isinstance(events, list)
        for event in events:
            yield json.dumps(event).encode()


def llama(**options: bool) -> LlamaDialect:
    given = {"embeddings": True, "rerank": False} | options
    return LlamaDialect(**given, scored_tokens_max=4, slots=2)


def translate(dialect: LlamaDialect, operation: Operation, **fields: object) -> Ask | Composed:
    return dialect.translate(operation, json.dumps({"model": "m"} | fields).encode())


async def composed(answer: Ask | Composed, engine: Script) -> Any:
    assert not isinstance(answer, Ask)
    return json.loads(b"".join([piece async for piece in answer(engine)]))


def test_which_operations_backends_have() -> None:
    tokens = {Operation.TOKENIZE, Operation.DETOKENIZE}
    spec = ModelSpec(model=MODEL)
    assert dialect_of(Fake(), spec).operations == frozenset(Operation)
    assert dialect_of(OpenAI(), spec).operations == frozenset(Operation)
    assert dialect_of(LlamaCpp(), spec).operations == GENERATION | tokens
    assert dialect_of(Transformers(), spec).operations == GENERATION | tokens
    assert dialect_of(object(), spec).operations == GENERATION
    no = ModelSpec(model=MODEL, options={"embeddings": "false"})
    for backend in (LlamaCpp(), Transformers()):
        assert Operation.EMBEDDINGS not in dialect_of(backend, no).operations
    ranks = ModelSpec(model=MODEL, options={"rerank": "true"})
    assert dialect_of(LlamaCpp(), ranks).operations == tokens | {Operation.RERANK}


def test_an_operation_that_is_not_there_is_refused_by_name() -> None:
    dialect = PlainDialect()
    check_operation(dialect, Operation.CHAT)
    with pytest.raises(UnsupportedOperation, match="/v1/rerank"):
        check_operation(dialect, Operation.RERANK)


def test_a_plain_request_passes_as_it_is() -> None:
    for operation in GENERATION:
        body = b'{"model": "m", "prompt": "x", "max_tokens": 1, "messages": [], "input": ""}'
        assert llama().translate(operation, body) == Ask(operation, body)
        assert PlainDialect().translate(operation, body) == Ask(operation, body)


def test_a_completion_without_a_length_has_the_length_of_the_api() -> None:
    ask = translate(llama(), Operation.COMPLETIONS, prompt="x")
    assert isinstance(ask, Ask)
    assert json.loads(ask.body)["max_tokens"] == 16


def test_tools_that_must_not_be_called_are_not_told() -> None:
    ask = translate(llama(), Operation.CHAT, messages=MESSAGES, tools=[TOOL], tool_choice="none")
    assert isinstance(ask, Ask)
    assert json.loads(ask.body) == {"model": "m", "messages": MESSAGES}


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": ""}}, {"type": "input_audio"}]
)
def test_what_is_no_text_is_refused_before_the_engine_fails_at_it(part: object) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    with pytest.raises(InvalidRequest) as refusal:
        translate(llama(), Operation.CHAT, messages=messages)
    assert refusal.value.param == "messages[0].content[1]"


@pytest.mark.parametrize(
    ("pieces", "holds"), [(["{"], True), ([" {"], False), ([[226], "{"], False)]
)
async def test_constraints_are_the_engines_only_where_they_hold(
    pieces: list[object], holds: bool
) -> None:
    dialect = llama()
    fields = {"messages": MESSAGES, "response_format": {"type": "json_object"}}
    engine = Script(
        {
            "/tokenize": {"tokens": [{"id": 1, "piece": piece} for piece in pieces]},
            "/apply-template": {"prompt": "hi"},
            "/v1/chat/completions": {"choices": [], "native": True},
            "/v1/completions": [{"choices": [{"index": 0, "text": "{}", "finish_reason": "stop"}]}],
        }
    )
    answer = await composed(translate(dialect, Operation.CHAT, **fields), engine)
    paths = [path for path, _ in engine.asked]
    assert paths[0] == "/tokenize"
    again = translate(dialect, Operation.CHAT, **fields)
    if holds:
        assert answer["native"]
        assert isinstance(again, Ask)
    else:
        assert answer["choices"][0]["message"]["content"] == "{}"
        assert "root ::= " in engine.asked[-1][1]["grammar"]
        assert not isinstance(again, Ask)


async def test_a_prompt_that_is_too_long_to_be_scored_is_refused() -> None:
    asked = translate(llama(), Operation.COMPLETIONS, prompt=[1, 2, 3, 4, 5], echo=True, logprobs=1)
    engine = Script({"/detokenize": {"content": "x"}})
    with pytest.raises(InvalidRequest, match=r"at most 4 tokens.*scored_tokens_max") as refusal:
        await composed(asked, engine)
    assert refusal.value.param == "echo"


async def test_one_prompt_that_fails_fails_the_request_as_itself() -> None:
    asked = translate(llama(), Operation.COMPLETIONS, prompt=["a", "b", "c"])
    with pytest.raises(InvalidRequest, match="too long"):
        await composed(asked, Script({"/v1/completions": InvalidRequest("too long")}))


async def test_an_answer_that_is_no_answer_is_the_engines_fault() -> None:
    asked = translate(llama(), Operation.COMPLETIONS, prompt=["a"])
    with pytest.raises(BackendProtocolError):
        await composed(asked, Script({"/v1/completions": [{"choices": 5}]}))
    asked = translate(llama(), Operation.TOKENIZE, prompt="a")
    with pytest.raises(BackendProtocolError):
        await composed(asked, Script({"/tokenize": {"tokens": "none"}}))


class TestForeign:
    dialect = OpenAI().dialect(ModelSpec(model=MODEL, url="http://127.0.0.1:1"))

    def ask(self, operation: Operation, **fields: object) -> Ask | Composed:
        return self.dialect.translate(operation, json.dumps({"model": "alias"} | fields).encode())

    async def test_tokens_are_asked_for_where_vllm_has_them(self) -> None:
        answer = {"count": 1, "max_model_len": 8, "tokens": [7], "token_strs": None}
        engine = Script({"/tokenize": answer, "/detokenize": {"prompt": "a"}})
        asked = self.ask(Operation.TOKENIZE, prompt="a", keep_alive=5)
        assert await composed(asked, engine) == answer
        assert await composed(self.ask(Operation.DETOKENIZE, tokens=[7]), engine) == {"prompt": "a"}
        assert engine.asked == [
            ("/tokenize", {"model": MODEL, "prompt": "a"}),
            ("/detokenize", {"model": MODEL, "tokens": [7]}),
        ]

    async def test_another_form_is_no_such_operation(self) -> None:
        engine = Script({"/tokenize": {"tokens": []}, "/v1/rerank": {"results": [{"index": 1}]}})
        with pytest.raises(UnsupportedOperation):
            await composed(self.ask(Operation.TOKENIZE, prompt="a"), engine)
        with pytest.raises(UnsupportedOperation):
            await composed(self.ask(Operation.RERANK, query="a", documents=["b"]), engine)

    async def test_documents_are_ranked_in_our_form(self) -> None:
        ranks = [
            {"index": n, "relevance_score": score} for n, score in ((2, 0.9), (0, 0.5), (1, 0.7))
        ]
        engine = Script({"/v1/rerank": {"results": ranks, "usage": {"total_tokens": 9}}})
        asked = self.ask(
            Operation.RERANK,
            query="q",
            documents=["a", {"text": "b"}, "c"],
            top_n=2,
            return_documents=True,
        )
        answer = await composed(asked, engine)
        assert [row["index"] for row in answer["results"]] == [2, 1]
        assert answer["results"][1] == {
            "index": 1,
            "relevance_score": 0.7,
            "document": {"text": "b"},
        }
        assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
        assert engine.asked[0][1] == {"model": MODEL, "query": "q", "documents": ["a", "b", "c"]}
