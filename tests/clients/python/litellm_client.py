"""LiteLLM as a client: python litellm_client.py URL KEY; prints what it saw as one JSON."""

from __future__ import annotations

import json
import os
import sys

# Read as it is imported: prices come with the package, fetch none.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

url, key = sys.argv[1:]
CHAT = [{"role": "user", "content": "What is 2+2?"}]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "tell", "description": "Tell the answer.", "parameters": SCHEMA},
}
to = {"api_base": f"{url}/v1", "api_key": key, "timeout": 60, "max_retries": 5}


def chat(model: str = "openai/tiny", **options: object) -> litellm.ModelResponse:
    """Ask a model of ours."""
    return litellm.completion(model=model, messages=CHAT, **to, **options)


def text_of(stream: litellm.CustomStreamWrapper) -> str:
    """All that a stream said."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


seen: dict[str, object] = {}
asked = {"max_tokens": 8, "temperature": 0, "seed": 1}
whole = chat(**asked)
seen["chat"] = {
    "text": whole.choices[0].message.content,
    "tokens": whole.usage.completion_tokens,
}
seen["stream"] = {"text": text_of(chat(**asked, stream=True))}

called = chat(max_tokens=200, tools=[TOOL], tool_choice="required").choices[0]
call = called.message.tool_calls[0].function
seen["tools"] = {"name": call.name, "arguments": json.loads(call.arguments)}

wanted = {"name": "answer", "strict": True, "schema": SCHEMA}
shaped = chat(max_tokens=200, response_format={"type": "json_schema", "json_schema": wanted})
seen["json_schema"] = json.loads(shaped.choices[0].message.content)

embedded = litellm.embedding(model="openai/tiny", input=["one", "two"], **to)
seen["embeddings"] = {"sizes": [len(row["embedding"]) for row in embedded.data]}

retried = chat("openai/cold-retried", extra_headers={"X-SLLM-Wait": "0"})
seen["retries"] = {"finish_reason": retried.choices[0].finish_reason}
seen["cold_start"] = {"text": text_of(chat("openai/cold-streamed", stream=True))}

try:
    chat("openai/nobody")
except litellm.NotFoundError as error:
    seen["unknown_model"] = {"status": error.status_code}
print(json.dumps(seen))
