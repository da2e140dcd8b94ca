"""LangChain: python langchain_client.py URL KEY; prints what it saw as one JSON."""

from __future__ import annotations

import json
import sys
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

url, key = sys.argv[1:]
PROMPT = "What is 2+2?"


class Answer(BaseModel):
    """Few words to choose from, so that random weights end soon, too."""

    answer: Literal["yes", "no"]


@tool
def tell(answer: Literal["yes", "no"]) -> str:
    """Tell the answer."""
    return answer


def chat(model: str = "tiny", **options: object) -> ChatOpenAI:
    """A model of ours."""
    return ChatOpenAI(
        base_url=f"{url}/v1", api_key=key, model=model, max_retries=5, timeout=60, **options
    )


seen: dict[str, object] = {}
short = chat(max_tokens=8, temperature=0, seed=1)
whole = short.invoke(PROMPT)
seen["chat"] = {"text": whole.content, "tokens": whole.usage_metadata["output_tokens"]}
seen["stream"] = {"text": "".join(piece.content for piece in short.stream(PROMPT))}

call = chat(max_tokens=200).bind_tools([tell], tool_choice="any").invoke(PROMPT).tool_calls[0]
seen["tools"] = {"name": call["name"], "arguments": call["args"]}

shaped = chat(max_tokens=200).with_structured_output(Answer, method="json_schema").invoke(PROMPT)
seen["json_schema"] = shaped.model_dump()

embedder = OpenAIEmbeddings(
    base_url=f"{url}/v1", api_key=key, model="tiny", check_embedding_ctx_length=False
)
seen["embeddings"] = {"sizes": [len(row) for row in embedder.embed_documents(["one", "two"])]}

retried = chat("cold-retried", default_headers={"X-SLLM-Wait": "0"}).invoke(PROMPT)
seen["retries"] = {"finish_reason": retried.response_metadata["finish_reason"]}
seen["cold_start"] = {
    "text": "".join(piece.content for piece in chat("cold-streamed").stream(PROMPT))
}
print(json.dumps(seen))
