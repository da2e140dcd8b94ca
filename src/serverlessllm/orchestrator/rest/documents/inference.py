"""`/v1/*` as the document tells it."""

from __future__ import annotations

from typing import Annotated

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

_INFERENCE = "Inference"
_MODELS = "Models"
_ASKED = (400, 401, 403, 404, 405, 408, 409, 413, 415, 429, 502, 503, 504, 507)
_WAIT = Parameter(
    name="x-sllm-wait",
    where="header",
    type=Annotated[float, Meta(ge=0)],
    description="Seconds to wait for a model that is not ready; 0: answer 503 at once.",
)
_AGAIN = Parameter(
    name="idempotency-key",
    where="header",
    type=Annotated[str, Meta(min_length=1, max_length=255, pattern="^[!-~]+$")],
    description="Name of this request: sent again with the same body, it gets the same answer.",
)
_EVENTS = "With `stream`: server-sent events, the last of them `[DONE]`."

INFERENCE = (
    Operation(
        path="/v1/chat/completions",
        method="post",
        tag=_INFERENCE,
        summary="Continue a conversation",
        body=ChatRequest,
        answers=(
            Answer(description="The answer.", type=ChatCompletion),
            Answer(description=_EVENTS, type=ChatCompletionChunk, content_type=EVENTS),
        ),
        parameters=(_WAIT, _AGAIN),
        errors=_ASKED,
    ),
    Operation(
        path="/v1/completions",
        method="post",
        tag=_INFERENCE,
        summary="Continue a text",
        body=CompletionRequest,
        answers=(
            Answer(description="The answer.", type=Completion),
            Answer(description=_EVENTS, type=Completion, content_type=EVENTS),
        ),
        parameters=(_WAIT, _AGAIN),
        errors=_ASKED,
    ),
    Operation(
        path="/v1/embeddings",
        method="post",
        tag=_INFERENCE,
        summary="Turn texts into vectors",
        body=EmbeddingsRequest,
        answers=(Answer(description="The vectors.", type=EmbeddingList),),
        parameters=(_WAIT, _AGAIN),
        errors=_ASKED,
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
        parameters=(
            Parameter(
                name="model",
                where="path",
                type=str,
                description="Its name or an alias; a `/` in it may stand as it is.",
            ),
        ),
        errors=(401, 403, 404, 405),
    ),
)
