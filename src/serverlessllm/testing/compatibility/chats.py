"""What a chat may say."""

from __future__ import annotations

import json
from typing import Any

from serverlessllm.testing.compatibility.asking import Behaviour, Check, Client

_PROMPTS = ("one two", "red blue", "cold", "the big model", "wakes", "three four")
_TOKEN = 270
"""` store`, in the vocabulary of the test's models."""
_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": _SCHEMA}} for name in ("f", "g")
]
_PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="


async def _stream(client: Client) -> bool:
    chunks = await client.chat(stream=True)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    return len(chunks) > 2 and text == await client.say()


async def _usage_chunk(client: Client) -> bool:
    last = (await client.chat(stream=True, stream_options={"include_usage": True}))[-1]
    return not last["choices"] and bool(last["usage"]["completion_tokens"] == 12)


async def _length(client: Client) -> bool:
    answers = [
        await client.chat(max_tokens=3),
        await client.chat(max_tokens=None, max_completion_tokens=3),
    ]
    return all(answer["usage"]["completion_tokens"] == 3 for answer in answers) and all(
        answer["choices"][0]["finish_reason"] == "length" for answer in answers
    )


async def _several(client: Client) -> bool:
    asked = {"n": 3, "temperature": 1, "seed": 1}
    answer = await client.chat(**asked)
    chunks = await client.chat(stream=True, stream_options={"include_usage": True}, **asked)
    streamed = {choice["index"] for chunk in chunks for choice in chunk["choices"]}
    spent = [answer["usage"]["completion_tokens"], chunks[-1]["usage"]["completion_tokens"]]
    once = (await client.chat())["usage"]["prompt_tokens"]
    return (
        [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        and streamed == {0, 1, 2}
        and spent == [36, 36]
        and answer["usage"]["prompt_tokens"] == once
    )


async def _stop(client: Client) -> bool:
    text = await client.say()
    stop = text.split()[3]
    answer = (await client.chat(stop=[stop]))["choices"][0]
    return bool(answer["message"]["content"] == text[: text.index(stop)])


async def _seed(client: Client) -> bool:
    said = [await client.say(temperature=1.5, seed=seed) for seed in (1, 1, 2, 3)]
    return said[0] == said[1] and len(set(said)) > 1


async def _temperature(client: Client) -> bool:
    cold = {await client.say() for _ in range(2)}
    return len(cold) == 1 and len({await client.say(temperature=2, seed=s) for s in range(4)}) > 1


def _as_greedy(**fields: object) -> Check:
    async def check(client: Client) -> bool:
        hot = {await client.say(temperature=2, seed=seed) for seed in range(4)}
        held = {await client.say(temperature=2, seed=seed, **fields) for seed in range(4)}
        return len(hot) > 1 and held == {await client.say()}

    return check


def _changes(**fields: object) -> Check:
    async def check(client: Client) -> bool:
        for prompt in _PROMPTS:
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
            if await client.say(**asked) != await client.say(**asked, **fields):
                return True
        return False

    return check


async def _bias(client: Client) -> bool:
    answer = await client.chat(logit_bias={str(_TOKEN): 100}, max_tokens=2)
    text: str = answer["choices"][0]["message"]["content"]
    return text.strip() == "store store"


async def _scores(client: Client) -> bool:
    choice = (await client.chat(logprobs=True))["choices"][0]
    scores = choice["logprobs"]["content"]
    spelled = "".join(score["token"] for score in scores)
    return len(scores) == 12 and spelled.strip() == choice["message"]["content"].strip()


async def _alternatives(client: Client) -> bool:
    choice = (await client.chat(logprobs=True, top_logprobs=3))["choices"][0]
    return all(len(score["top_logprobs"]) == 3 for score in choice["logprobs"]["content"])


async def _object(client: Client) -> bool:
    asked = {"response_format": {"type": "json_object"}, "max_tokens": 200}
    return (await client.say(**asked)).lstrip().startswith("{")


def _is_value(text: str) -> bool:
    try:
        return isinstance(json.loads(text)["on"], bool)
    except (ValueError, KeyError, TypeError):
        return False


async def _schema(client: Client) -> bool:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}}
    return _is_value(await client.say(response_format=form, max_tokens=100))


def _calls(answer: Any) -> list[tuple[str, str]]:
    calls = answer["choices"][0]["message"].get("tool_calls") or ()
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


async def _tools(client: Client) -> bool:
    told = await client.chat(tools=_TOOLS)
    plain = await client.chat()
    return bool(told["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"])


async def _no_tools(client: Client) -> bool:
    return not _calls(await client.chat(tools=_TOOLS, tool_choice="none"))


async def _required(client: Client) -> bool:
    answer = await client.chat(tools=_TOOLS, tool_choice="required", max_tokens=120)
    return [_is_value(arguments) for _, arguments in _calls(answer)] == [True]


async def _named(client: Client) -> bool:
    choice = {"type": "function", "function": {"name": "g"}}
    answer = await client.chat(tools=_TOOLS, tool_choice=choice, max_tokens=120)
    return [(name, _is_value(said)) for name, said in _calls(answer)] == [("g", True)]


async def _streamed_call(client: Client) -> bool:
    asked = {"tools": _TOOLS, "tool_choice": "required", "max_tokens": 120}
    chunks = await client.chat(stream=True, **asked)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    parts = [part for delta in deltas for part in delta.get("tool_calls") or ()]
    return _is_value("".join(part["function"].get("arguments") or "" for part in parts))


async def _results(client: Client) -> bool:
    called = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c", "content": "two"},
    ]
    told = await client.chat(messages=messages)
    plain = await client.chat(messages=messages[:1])
    return bool(told["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"])


async def _roles(client: Client) -> bool:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "one"}]},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": [{"type": "text", "text": "four"}]},
    ]
    return bool(await client.say(messages=messages))


async def _image(client: Client) -> bool:
    image = {"type": "image_url", "image_url": {"url": _PIXEL}}
    told = await client.chat(messages=[{"role": "user", "content": [image]}])
    return not told["choices"][0]["message"]["content"]


_ROWS: tuple[tuple[str, Check], ...] = (
    ("`messages`: every role, content as text or parts", _roles),
    ("an image in a message", _image),
    ("`stream`", _stream),
    ("`stream_options.include_usage`", _usage_chunk),
    ("`max_tokens`, `max_completion_tokens`", _length),
    ("`n`, all of them counted", _several),
    ("`stop`", _stop),
    ("`seed`", _seed),
    ("`temperature`", _temperature),
    ("`top_p`", _as_greedy(top_p=1e-6)),
    ("`presence_penalty`", _changes(presence_penalty=2)),
    ("`frequency_penalty`", _changes(frequency_penalty=2)),
    ("`logit_bias`", _bias),
    ("`logprobs`", _scores),
    ("`top_logprobs`", _alternatives),
    ("`response_format`: `json_object`", _object),
    ("`response_format`: `json_schema`", _schema),
    ("`tools`: the model is told", _tools),
    ("`tool_choice`: `none`", _no_tools),
    ("`tool_choice`: `required`", _required),
    ("`tool_choice`: a function", _named),
    ("a call, streamed", _streamed_call),
    ("calls and their results in `messages`", _results),
    ("`top_k` (beyond the API)", _as_greedy(top_k=1)),
    ("`min_p` (beyond the API)", _as_greedy(min_p=1)),
)
CHATS = tuple(Behaviour("/v1/chat/completions", name, check) for name, check in _ROWS)
