"""`serverlessllm.v1.Inference`: the OpenAI API, with what HTTP has no place for typed."""

from __future__ import annotations

from functools import partial
from urllib.parse import quote

import msgspec

from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.errors import ModelNotFound, SLLMError
from serverlessllm.edge.upstream import Response
from serverlessllm.openai.models import ModelObject
from serverlessllm.orchestrator.grpc.asking import Asking, events, is_stream
from serverlessllm.orchestrator.grpc.calls import Call, Serve, one
from serverlessllm.orchestrator.grpc.proto.serverlessllm_pb2 import (
    Chunk,
    Error,
    InferenceEvent,
    InferenceRequest,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    ModelStatus,
    Progress,
    WatchModelRequest,
)
from serverlessllm.orchestrator.grpc.statuses import Failure, Loading, Refused, failure_of
from serverlessllm.orchestrator.grpc.watching import Watching
from serverlessllm.orchestrator.listeners import Listeners
from serverlessllm.orchestrator.status import Status

SERVICE = "serverlessllm.v1.Inference"
_NAME_CHARS_MAX = 512


class _ModelList(msgspec.Struct, frozen=True):
    data: tuple[ModelObject, ...]


_models = msgspec.json.Decoder(_ModelList)
_model = msgspec.json.Decoder(ModelObject)


class OpenAI:
    """`methods` by name."""

    def __init__(self, asking: Asking, watching: Watching, listeners: Listeners) -> None:
        self._asking = asking
        self._listeners = listeners
        self._watching = watching
        self.methods: dict[str, Serve] = {
            "ChatCompletions": partial(self._answer, "/v1/chat/completions"),
            "Completions": partial(self._answer, "/v1/completions"),
            "Embeddings": partial(self._answer, "/v1/embeddings"),
            "ListModels": one(ListModelsRequest, self._list_models),
            "WatchModel": self._watch_model,
        }

    async def _answer(self, path: str, call: Call) -> None:
        try:
            request = await call.receive(InferenceRequest)
            body = request.json.encode()
            with self._listeners.listening(partial(_tell, call)) as name:
                async with self._asking.ask(call, "POST", path, body, listener=name) as response:
                    await self._send(call, response)
        except (Refused, SLLMError) as error:
            failure = failure_of(error)
            await call.send(InferenceEvent(error=_error(failure)))
            raise Refused(failure) from error

    async def _send(self, call: Call, response: Response) -> None:
        if not is_stream(response):
            await call.send(_chunk(await self._asking.read(response)))
            return
        async for event in events(response):
            if isinstance(event, Loading):
                await call.send(InferenceEvent(progress=_progress(event)))
            else:
                await call.send(_chunk(event))

    async def _list_models(self, call: Call, _: ListModelsRequest) -> ListModelsResponse:
        listed = _models.decode(await self._asking.whole(call, "GET", "/v1/models"))
        return ListModelsResponse(
            models=[
                Model(
                    id=model.id,
                    created_s=model.created,
                    owned_by=model.owned_by,
                    root=model.root,
                )
                for model in listed.data
            ]
        )

    async def _watch_model(self, call: Call) -> None:
        request = await call.receive(WatchModelRequest)
        model = await known_model(self._asking, call, request.model)
        async for status in self._watching.changes(model.root):
            await call.send(_status(model.id, status))


async def known_model(asking: Asking, call: Call, name: str) -> ModelObject:
    """A registered model that the client may use, by its name or an alias.

    Raises:
        Refused: there is none, or it may not.
    """
    if not name:
        raise ModelNotFound("the name of the model is missing", param="model")
    if len(name) > _NAME_CHARS_MAX:
        raise ModelNotFound("no model has a name as long as this", param="model")
    body = await asking.whole(call, "GET", f"/v1/models/{quote(name, safe='/@:')}")
    return _model.decode(body)


async def known_models(asking: Asking, call: Call) -> tuple[ModelObject, ...]:
    """The registered models that the client may use."""
    return _models.decode(await asking.whole(call, "GET", "/v1/models")).data


async def _tell(call: Call, event: LoadEvent) -> None:
    """How far a load is, before there is anything of an answer."""
    await call.tell(())
    progress = Progress(
        state=event.state,
        stage=event.stage,
        bytes_done=event.bytes_done,
        bytes_total=event.bytes_total,
        eta_s=event.eta_s,
    )
    await call.send(InferenceEvent(progress=progress))


def _chunk(data: bytes) -> InferenceEvent:
    return InferenceEvent(chunk=Chunk(json=data.decode("utf-8", "replace")))


def _progress(loading: Loading) -> Progress:
    return Progress(
        state=loading.state,
        stage=loading.stage,
        bytes_done=loading.bytes,
        bytes_total=loading.total,
        eta_s=loading.eta_s,
    )


def _error(failure: Failure) -> Error:
    fields = failure.fields
    return Error(
        json=failure.body.decode("utf-8", "replace"),
        message=fields.message,
        type=fields.type,
        param=fields.param,
        code=fields.code,
        loading=None if failure.loading is None else _progress(failure.loading),
    )


def _status(name: str, status: Status) -> ModelStatus:
    return ModelStatus(
        model=name,
        root=status.model,
        state=status.state,
        stage=status.stage,
        bytes_done=status.bytes_done,
        bytes_total=status.bytes_total,
        eta_s=status.eta_s,
        agents_ready=status.agents_ready,
        cache_level=status.cache_level,
    )
