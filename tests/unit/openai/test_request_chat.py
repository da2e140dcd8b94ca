"""Chats field by field: what is taken, what is refused, and under which name and code."""

from __future__ import annotations

import json
import types
import typing

import msgspec
import pytest
from openai.types import completion_create_params as completions
from openai.types import embedding_create_params as embeddings
from openai.types.chat import completion_create_params as chats

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.openai.request import (
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    parse_chat,
)
from serverlessllm.openai.settings import RequestLimits

LIMITS = RequestLimits()
USER = {"role": "user", "content": "hi"}
PIXEL = "data:image/png;base64,AAAA"


def chat(**fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": [USER]} | fields).encode()


def said(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


def parts(*parts: object, role: str = "user") -> dict[str, object]:
    return said({"role": role, "content": list(parts)})


def called(*calls: object) -> dict[str, object]:
    return said(ASSISTANT | {"tool_calls": list(calls)})


def tool(name: str = "f", **fields: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name} | fields}


def custom(name: str = "c", **fields: object) -> dict[str, object]:
    return {"type": "custom", "custom": {"name": name} | fields}


def shaped(**fields: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a"} | fields}}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CUSTOM_CALL = {"id": "1", "type": "custom", "custom": {"name": "c", "input": "x"}}
ASSISTANT = {"role": "assistant"}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
FILE = {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [tool(), custom()]},
}


@pytest.mark.parametrize(
    "fields",
    [
        said({"role": "system", "content": "be"}, {"role": "developer", "content": "x"}, USER),
        parts({"type": "text", "text": "be"}, role="system"),
        said({"role": "user", "content": "", "name": "ann"}),
        parts({"type": "text", "text": "a"}, AUDIO, FILE),
        parts({"type": "image_url", "image_url": {"url": PIXEL}}),
        said({"content": [{"text": "the type comes last", "type": "text"}], "role": "user"}),
        said(USER, ASSISTANT | {"content": ""}),
        said(USER, ASSISTANT | {"content": None, "tool_calls": [CALL, CUSTOM_CALL]}),
        said(
            USER,
            ASSISTANT | {"tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ),
        said(
            USER, ASSISTANT | {"content": None, "refusal": "no", "audio": None, "annotations": []}
        ),
        said(USER, ASSISTANT | {"content": [{"type": "refusal", "refusal": "no"}]}),
        said(USER, ASSISTANT | {"function_call": {"name": "f", "arguments": "{}"}}),
        said(USER, ASSISTANT | {"content": None, "reasoning_content": "hm"}),
        said({"role": "function", "name": "f", "content": None}),
        {"tools": [tool(), custom(), tool("g", parameters=SCHEMA, strict=True)]},
        {"tools": [], "tool_choice": "auto"},
        {
            "tools": [
                custom(format={"type": "grammar", "grammar": {"definition": "x", "syntax": "lark"}})
            ]
        },
        {"tools": [tool()], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [tool()], "tool_choice": tool()},
        {"tools": [custom()], "tool_choice": custom()},
        {"tools": [tool(), custom()], "tool_choice": ALLOWED},
        {"tool_choice": "none"},
        {"tool_choice": None, "parallel_tool_calls": None, "tools": None},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        shaped(),
        shaped(schema=SCHEMA, strict=None, description="x"),
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": False, "stream_options": None},
        {"logprobs": True, "top_logprobs": 20},
        {"top_logprobs": 0},
        {"logit_bias": {"0": -100, "2147483647": 100.0}},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"metadata": {"k" * 64: "v" * 512}},
        {"reasoning_effort": "minimal", "verbosity": "low", "user": "u", "store": True},
        {"prediction": {"type": "content", "content": "x"}},
        {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
        {"functions": [{"name": "f"}], "function_call": {"name": "f"}},
        {"stop": []},
        {"temperature": 1, "unknown": [1, {"a": None}], "min_p": 0.1},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_what_the_api_allows_is_taken(fields: dict[str, object]) -> None:
    assert parse_chat(chat(**fields), LIMITS).model == "m"


M0 = "messages[0]"
C0 = f"{M0}.content[0]"
MISSING, TYPE, VALUE, OBJECT = (
    "missing_required_parameter",
    "invalid_type",
    "invalid_value",
    "object_above_max_properties",
)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        (said({"role": "judge", "content": "x"}), f"{M0}.role", VALUE),
        (said({"role": 7, "content": "x"}), f"{M0}.role", TYPE),
        (said({"content": "x"}), f"{M0}.role", MISSING),
        (said({"role": "user"}), f"{M0}.content", MISSING),
        (said({"role": "user", "content": None}), f"{M0}.content", TYPE),
        (parts(), f"{M0}.content", "empty_array"),
        (parts("x"), f"{C0}", TYPE),
        (parts({"text": "x"}), f"{C0}.type", MISSING),
        (parts({"type": "video_url"}), f"{C0}.type", VALUE),
        (parts({"type": "text"}), f"{C0}.text", MISSING),
        (
            parts({"type": "image_url", "image_url": {"url": "http://x"}}),
            f"{C0}.image_url.url",
            VALUE,
        ),
        (parts({"type": "image_url", "image_url": PIXEL}), f"{C0}.image_url", TYPE),
        (
            parts({"type": "file", "file": {"file_data": "https://x"}}),
            f"{C0}.file.file_data",
            VALUE,
        ),
        (
            parts(AUDIO | {"input_audio": {"data": "", "format": "ogg"}}),
            f"{C0}.input_audio.format",
            VALUE,
        ),
        (
            parts({"type": "image_url", "image_url": {"url": PIXEL}}, role="system"),
            f"{C0}.type",
            VALUE,
        ),
        (parts({"text": "x"}, role="system"), f"{C0}.type", MISSING),
        (said(ASSISTANT), f"{M0}.content", MISSING),
        (said(ASSISTANT | {"content": None, "tool_calls": []}), f"{M0}.content", MISSING),
        (called({}), f"{M0}.tool_calls[0].type", MISSING),
        (
            called({"type": "function", "function": CALL["function"]}),
            f"{M0}.tool_calls[0].id",
            MISSING,
        ),
        (
            called(CALL | {"function": {"name": "f", "arguments": {}}}),
            f"{M0}.tool_calls[0].function.arguments",
            TYPE,
        ),
        (said({"role": "tool", "content": "4"}), f"{M0}.tool_call_id", MISSING),
        (said({"role": "tool", "tool_call_id": "1"}), f"{M0}.content", MISSING),
        (said({"role": "function", "content": "x"}), f"{M0}.name", MISSING),
        ({"tools": {}}, "tools", TYPE),
        ({"tools": [{}]}, "tools[0].type", MISSING),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", VALUE),
        ({"tools": [{"type": "function"}]}, "tools[0].function", MISSING),
        ({"tools": [tool("a b")]}, "tools[0].function.name", VALUE),
        ({"tools": [tool("a\n")]}, "tools[0].function.name", VALUE),
        ({"tools": [tool("a" * 65)]}, "tools[0].function.name", VALUE),
        ({"tools": [tool(parameters="x")]}, "tools[0].function.parameters", TYPE),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", TYPE),
        (
            {"tools": [tool(parameters={"x": "y" * 300_000})]},
            "tools[0].function.parameters",
            OBJECT,
        ),
        ({"tools": [tool(strict=1)]}, "tools[0].function.strict", TYPE),
        ({"tools": [tool(), tool()]}, "tools", VALUE),
        ({"tools": [tool(f"f{n}") for n in range(129)]}, "tools", "array_above_max_length"),
        ({"tool_choice": "sometimes"}, "tool_choice", VALUE),
        ({"tool_choice": "required"}, "tools", MISSING),
        ({"tool_choice": tool()}, "tools", MISSING),
        ({"tools": [tool()], "tool_choice": tool("g")}, "tool_choice.function.name", VALUE),
        ({"tools": [tool()], "tool_choice": custom("f")}, "tool_choice.custom.name", VALUE),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function", MISSING),
        (
            {"tools": [tool()], "tool_choice": ALLOWED},
            "tool_choice.allowed_tools.tools[1].custom.name",
            VALUE,
        ),
        ({"parallel_tool_calls": True}, "parallel_tool_calls", "invalid_request"),
        ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions", VALUE),
        ({"functions": []}, "functions", "empty_array"),
        ({"function_call": {"name": "f"}}, "function_call.name", VALUE),
        ({"response_format": "json"}, "response_format", TYPE),
        ({"response_format": {"type": "xml"}}, "response_format.type", VALUE),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", MISSING),
        (shaped(name="a b"), "response_format.json_schema.name", VALUE),
        (shaped(schema=True), "response_format.json_schema.schema", TYPE),
        (shaped(schema={"x": "y" * 300_000}), "response_format.json_schema.schema", OBJECT),
        ({"stream_options": {}}, "stream_options", "invalid_request"),
        ({"stream": False, "stream_options": {}}, "stream_options", "invalid_request"),
        (
            {"stream": True, "stream_options": {"include_usage": "yes"}},
            "stream_options.include_usage",
            TYPE,
        ),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_request"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"logprobs": 1}, "logprobs", TYPE),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]", "decimal_above_max_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", TYPE),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "integer_below_min_value"),
        ({"logit_bias": {"01": 1}}, "logit_bias", TYPE),
        ({"logit_bias": [[1, 1]]}, "logit_bias", TYPE),
        ({"logit_bias": {str(n): 1 for n in range(5000)}}, "logit_bias", OBJECT),
        ({"stop": [""]}, "stop[0]", "string_below_min_length"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"stop": "a" * 5000}, "stop", "string_above_max_length"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"seed": 1.5}, "seed", TYPE),
        ({"n": True}, "n", TYPE),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens", "integer_above_max_value"),
        ({"temperature": -1}, "temperature", "decimal_below_min_value"),
        ({"temperature": "hot"}, "temperature", TYPE),
        ({"user": "u" * 513}, "user", "string_above_max_length"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", OBJECT),
        ({"metadata": {"k": "v" * 513}}, "metadata[...]", "string_above_max_length"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "string_above_max_length"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", VALUE),
        ({"modalities": ["audio"]}, "audio", MISSING),
        ({"prediction": {"content": "x"}}, "prediction.type", MISSING),
        ({"keep_alive": "soon"}, "keep_alive", VALUE),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_the_api_forbids_is_refused(fields: dict[str, object], param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(chat(**fields), LIMITS)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.message.startswith(f"{param}: ")
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "x" * 1_000_000},
        said({"role": "x - at `$.model`" * 1000, "content": ""}),
        {"tool_choice": "auto` - at `$.model"},
    ],
    ids=["long", "a path inside", "a false path"],
)
def test_a_refused_value_is_not_told_at_length_nor_taken_for_a_path(
    fields: dict[str, object],
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(chat(**fields), LIMITS)
    assert len(caught.value.message) < 300
    assert caught.value.param in {"reasoning_effort", "messages[0].role", "tool_choice"}


def test_of_a_repeated_key_the_last_one_counts() -> None:
    body = b'{"model":"a","model":"b","messages":[{"role":"user","content":"x","content":"y"}]}'
    assert parse_chat(body, LIMITS).model == "b"
    twice = b'{"model":"a","messages":[{"role":"user","role":"system","content":"x"}]}'
    with pytest.raises(InvalidRequest):
        parse_chat(twice, LIMITS)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, None),
        ({"n": 3}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 7),
        ({"max_completion_tokens": 7, "n": 3}, 21),
    ],
)
def test_the_most_tokens_of_an_answer(fields: dict[str, object], tokens: int | None) -> None:
    assert parse_chat(chat(**fields), LIMITS).answer_tokens_max == tokens


NOT_TYPED = {"moderation", "prompt_cache_options"}
"""OpenAI's own services; they pass through."""


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        (chats.CompletionCreateParamsStreaming, ChatRequest),
        (completions.CompletionCreateParamsStreaming, CompletionRequest),
        (embeddings.EmbeddingCreateParams, EmbeddingsRequest),
    ],
    ids=["chat", "completion", "embeddings"],
)
def test_no_field_and_no_word_of_the_client_library_is_unknown(
    params: type, kind: type[msgspec.Struct]
) -> None:
    known = typing.get_type_hints(kind)
    for name, theirs in typing.get_type_hints(params).items():
        if name in NOT_TYPED:
            continue
        assert name in known
        words = _words(known[name])
        assert not words or _words(theirs) <= words


def _words(kind: object) -> set[str]:
    """The literal texts at the top of a type."""
    if typing.get_origin(kind) is typing.Literal:
        return {word for word in typing.get_args(kind) if isinstance(word, str)}
    if typing.get_origin(kind) in {typing.Union, types.UnionType}:
        return set().union(*(_words(one) for one in typing.get_args(kind)))
    return set()
