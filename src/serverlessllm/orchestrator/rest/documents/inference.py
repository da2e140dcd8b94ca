"""`/v1/*` as the document tells it."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from serverlessllm.openai.document import Answer, Operation, Parameter
from serverlessllm.openai.document.answers import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    EmbeddingList,
    Model,
    ModelPage,
)
from serverlessllm.openai.document.operation import EVENTS
from serverlessllm.openai.request import ChatRequest, CompletionRequest, EmbeddingsRequest
from serverlessllm.openai.request.fields import ModelName
from serverlessllm.openai.rerank import Reranked, RerankRequest
from serverlessllm.openai.tokenize import (
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)

_INFERENCE = "Inference"
_MODELS = "Models"
ASKED = (400, 401, 403, 404, 405, 408, 409, 413, 415, 429, 502, 503, 504, 507)
WAIT = Parameter(
    name="x-sllm-wait",
    where="header",
    type=Annotated[float, Meta(ge=0)],
    description="Seconds to wait for a model that is not ready; 0: answer 503 at once.",
)
_PROGRESS = Parameter(
    name="x-sllm-progress",
    where="header",
    type=Annotated[str, Meta(pattern="^chunk$")],
    description="Tell a stream's client how far a load is by chunks with an empty delta and a "
    "`loading` field, where it cannot see comments.",
)
AGAIN = Parameter(
    name="idempotency-key",
    where="header",
    type=Annotated[str, Meta(min_length=1, max_length=255)],
    description="Name of this request: sent again with the same body, it gets the same answer.",
)
MODEL = Parameter(
    name="model",
    where="path",
    type=ModelName,
    description="Its name or an alias; a `/` in it may stand as it is.",
)
_EVENTS = "With `stream`: server-sent events, the last of them `[DONE]`."

_CHAT = '{"model":"org/name","messages":[{"role":"user","content":"What is 2+2?"}],"max_tokens":64}'


def asks(
    tag: str,
    path: str,
    summary: str,
    body: Any,
    *answers: Answer,
    example: str = "",
    parameters: tuple[Parameter, ...] = (),
    error: Any = None,
) -> Operation:
    """One that asks a model."""
    return Operation(
        path=path,
        method="post",
        tag=tag,
        summary=summary,
        body=body,
        example=example,
        answers=answers,
        parameters=parameters,
        errors=ASKED,
        error=error,
    )


INFERENCE = (
    asks(
        _INFERENCE,
        "/v1/chat/completions",
        "Continue a conversation",
        ChatRequest,
        Answer(description="The answer.", type=ChatCompletion),
        Answer(description=_EVENTS, type=ChatCompletionChunk, content_type=EVENTS),
        example=_CHAT,
        parameters=(WAIT, _PROGRESS, AGAIN),
    ),
    asks(
        _INFERENCE,
        "/v1/completions",
        "Continue a text",
        CompletionRequest,
        Answer(description="The answer.", type=Completion),
        Answer(description=_EVENTS, type=Completion, content_type=EVENTS),
        example='{"model":"org/name","prompt":"Once upon a time","max_tokens":64}',
        parameters=(WAIT, AGAIN),
    ),
    asks(
        _INFERENCE,
        "/v1/embeddings",
        "Turn texts into vectors",
        EmbeddingsRequest,
        Answer(description="The vectors.", type=EmbeddingList),
        example='{"model":"org/name","input":["one","two"]}',
        parameters=(WAIT, AGAIN),
    ),
    asks(
        _INFERENCE,
        "/v1/tokenize",
        "Turn a text or a chat into tokens",
        TokenizeRequest,
        Answer(description="The tokens.", type=Tokenized),
        example='{"model":"org/name","prompt":"one two"}',
        parameters=(WAIT, AGAIN),
    ),
    asks(
        _INFERENCE,
        "/v1/detokenize",
        "Turn tokens into a text",
        DetokenizeRequest,
        Answer(description="The text.", type=Detokenized),
        example='{"model":"org/name","tokens":[1,2]}',
        parameters=(WAIT, AGAIN),
    ),
    asks(
        _INFERENCE,
        "/v1/rerank",
        "Put documents in order",
        RerankRequest,
        Answer(description="The documents, the best first.", type=Reranked),
        example='{"model":"org/name","query":"a fruit","documents":["a car","a pear"]}',
        parameters=(WAIT, AGAIN),
    ),
    Operation(
        path="/v1/models",
        method="get",
        tag=_MODELS,
        summary="List the models",
        answers=(Answer(description="Every model that the key may use.", type=ModelPage),),
        errors=(401, 403, 405),
    ),
    Operation(
        path="/v1/models/{model}",
        method="get",
        tag=_MODELS,
        summary="Show a model",
        answers=(Answer(description="The model.", type=Model),),
        parameters=(MODEL,),
        errors=(401, 403, 404, 405),
    ),
)
