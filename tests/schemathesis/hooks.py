"""Make what schemathesis makes up count: a model that exists, few tokens, and of valid requests
those that also follow the rules that no schema can tell.

`scripts/schemathesis.sh` loads it, in an environment of its own.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

import schemathesis
from schemathesis import GenerationMode

MODEL = "fake"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]{0,94}")
_TOKENS_MAX = 8
_ANSWERS_MAX = 2
_COUNTS = {
    "max_tokens": _TOKENS_MAX,
    "max_completion_tokens": _TOKENS_MAX,
    "max_output_tokens": _TOKENS_MAX,
    "n": _ANSWERS_MAX,
    "best_of": _ANSWERS_MAX,
    "dimensions": _TOKENS_MAX,
}
_LIMITS = {"n": 128, "best_of": 128, "dimensions": 65_536}
_TOKENS_LIMIT = 1_048_576


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change a request just before it is sent."""
    valid = case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE
    if valid and case.headers and "idempotency-key" in case.headers:
        case.headers["idempotency-key"] = uuid.uuid4().hex  # one that was used before is refused
    body = case.body
    if not isinstance(body, dict):
        return
    body = case.body = _whole(body)
    if not case.path.startswith("/v1/"):
        if valid:
            _repair_order(body)
        return
    if isinstance(body.get("model"), str) and _NAME.fullmatch(body["model"]):
        body["model"] = MODEL
    for field, most in _COUNTS.items():
        value, limit = body.get(field), _LIMITS.get(field, _TOKENS_LIMIT)
        if type(value) is int and most < value <= limit:
            body[field] = most
    if valid:
        _repair(body)
        if case.path == "/v1/tokenize":
            body.pop("messages", None)
            body["prompt"] = body.get("prompt") or "x"


def _whole(value: Any) -> Any:
    """The same with 3 for 3.0: to a schema both are integers, but nobody writes the second."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {key: _whole(one) for key, one in value.items()}
    return value


def _repair(body: dict[str, Any]) -> None:
    """What one field says about another."""
    if not body.get("stream"):
        body.pop("stream_options", None)
    if body.get("top_logprobs") and "messages" in body:
        body["logprobs"] = True
    for message in body.get("messages") or ():
        if isinstance(message, dict) and message.get("role") == "assistant":
            message["content"] = message.get("content") or "x"
    if body.get("continue_final_message"):
        body["add_generation_prompt"] = False
    _repair_tools(body)
    if "audio" in (body.get("modalities") or ()) and not body.get("audio"):
        del body["modalities"]
    if body.get("max_tokens") == 0:
        body["echo"] = True
    if body.get("best_of") is not None:
        body["best_of"] = max(body["best_of"], body.get("n") or 1)
        body["stream"] = False
        body.pop("stream_options", None)


def _repair_order(body: dict[str, Any]) -> None:
    """The same of what operators order."""
    for field in ("expires_s", "min_replicas", "source"):
        body.pop(field, None)
    if set(body) <= {"model", "backend"} and isinstance(body.get("model"), str):
        body["model"] = f"org/{uuid.uuid4().hex}"  # what a hub can have: it is pulled from there


def _repair_tools(body: dict[str, Any]) -> None:
    """Functions only, each name once; no choice among tools that are not there."""
    if isinstance(body.get("tools"), list):
        body["tools"] = [tool for tool in body["tools"] if tool.get("type") != "custom"]
    for field in ("tools", "functions"):
        if isinstance(body.get(field), list):
            named = {json.dumps(_name_of(tool)): tool for tool in body[field]}
            body[field] = list(named.values())
    if not isinstance(body.get("tool_choice"), str) or not body.get("tools"):
        body.pop("tool_choice", None)
    if not body.get("tools"):
        body.pop("parallel_tool_calls", None)
    if isinstance(body.get("function_call"), dict):
        del body["function_call"]


def _name_of(tool: dict[str, Any]) -> Any:
    return tool.get("name") or {
        key: tool[key].get("name") for key in tool if key != "type" and isinstance(tool[key], dict)
    }
