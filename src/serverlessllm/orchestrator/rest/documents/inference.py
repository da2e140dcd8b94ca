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
_EVENTS = "With `stream`: server-sent events, the last of them `[DONE]`."

_CHAT = '{"model":"org/name","messages":[{"role":"user","content":"What is 2+2?"}],"max_tokens":64}'

INFERENCE = (
    Operation(
        path="/v1/chat/completions",
        method="post",
        tag=_INFERENCE,
        summary="Continue a conversation",
        body=ChatRequest,
        example=_CHAT,
        answers=(
            Answer(description="The answer.", type=ChatCompletion),
            Answer(description=_EVENTS, type=ChatCompletionChunk, content_type=EVENTS),
        ),
        parameters=(WAIT, _PROGRESS, AGAIN),
        errors=ASKED,
    ),
    Operation(
        path="/v1/completions",
        method="post",
        tag=_INFERENCE,
        summary="Continue a text",
        body=CompletionRequest,
        example='{"model":"org/name","prompt":"Once upon a time","max_tokens":64}',
        answers=(
            Answer(description="The answer.", type=Completion),
            Answer(description=_EVENTS, type=Completion, content_type=EVENTS),
        ),
        parameters=(WAIT, AGAIN),
        errors=ASKED,
    ),
    Operation(
        path="/v1/embeddings",
        method="post",
        tag=_INFERENCE,
        summary="Turn texts into vectors",
        body=EmbeddingsRequest,
        example='{"model":"org/name","input":["one","two"]}',
        answers=(Answer(description="The vectors.", type=EmbeddingList),),
        parameters=(WAIT, AGAIN),
        errors=ASKED,
    ),
    Operation(
        path="/v1/tokenize",
        method="post",
        tag=_INFERENCE,
        summary="Turn a text or a chat into tokens",
        body=TokenizeRequest,
        example='{"model":"org/name","prompt":"one two"}',
        answers=(Answer(description="The tokens.", type=Tokenized),),
        parameters=(WAIT, AGAIN),
        errors=ASKED,
    ),
    Operation(
        path="/v1/detokenize",
        method="post",
        tag=_INFERENCE,
        summary="Turn tokens into a text",
        body=DetokenizeRequest,
        example='{"model":"org/name","tokens":[1,2]}',
        answers=(Answer(description="The text.", type=Detokenized),),
        parameters=(WAIT, AGAIN),
        errors=ASKED,
    ),
    Operation(
        path="/v1/rerank",
        method="post",
        tag=_INFERENCE,
        summary="Put documents in order",
        body=RerankRequest,
        example='{"model":"org/name","query":"a fruit","documents":["a car","a pear"]}',
        answers=(Answer(description="The documents, the best first.", type=Reranked),),
        parameters=(WAIT, AGAIN),
        errors=ASKED,
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
                type=ModelName,
                description="Its name or an alias; a `/` in it may stand as it is.",
            ),
        ),
        errors=(401, 403, 404, 405),
    ),
)
