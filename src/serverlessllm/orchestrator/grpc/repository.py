"""`inference.GRPCInferenceService`: the server, its models, and what an operator may do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from serverlessllm import __version__
from serverlessllm.core.agentapi import LoadEvent
from serverlessllm.core.errors import BackendDied, InvalidRequest
from serverlessllm.core.failures import error_of
from serverlessllm.orchestrator.grpc.asking import Asking
from serverlessllm.orchestrator.grpc.calls import Call, Serve, one
from serverlessllm.orchestrator.grpc.openai import known_model, known_models
from serverlessllm.orchestrator.grpc.proto import open_inference_pb2 as pb
from serverlessllm.orchestrator.grpc.statistics import Figures, Statistics
from serverlessllm.orchestrator.grpc.statuses import Refused
from serverlessllm.orchestrator.grpc.texts import EMBEDDING, INPUTS, OUTPUTS
from serverlessllm.orchestrator.grpc.triton import VERSION, check_version
from serverlessllm.orchestrator.grpc.watching import Watching
from serverlessllm.orchestrator.rest.wire import LoadModel, UnloadModel
from serverlessllm.orchestrator.status import READY
from serverlessllm.orchestrator.view import ClusterView

SERVICE = "inference.GRPCInferenceService"

_PLATFORM = "serverlessllm"
_EXTENSIONS = ("model_configuration", "model_repository", "statistics")
_NOT_FOUND = 404
_TYPES = {"BYTES": pb.TYPE_STRING, "BOOL": pb.TYPE_BOOL, "FP32": pb.TYPE_FP32}
_HARMLESS = frozenset({"unload_dependents"})


class Repository:
    """`methods` by name; `not_ready` says why no request should be sent here, if so."""

    def __init__(
        self,
        asking: Asking,
        *,
        view: ClusterView,
        watching: Watching,
        statistics: Statistics,
        not_ready: Callable[[], str],
    ) -> None:
        self._asking = asking
        self._view = view
        self._watching = watching
        self._statistics = statistics
        self._not_ready = not_ready
        self.methods: dict[str, Serve] = {
            "ServerLive": one(pb.ServerLiveRequest, self._live),
            "ServerReady": one(pb.ServerReadyRequest, self._ready),
            "ServerMetadata": one(pb.ServerMetadataRequest, self._metadata),
            "ModelReady": one(pb.ModelReadyRequest, self._model_ready),
            "ModelMetadata": one(pb.ModelMetadataRequest, self._model_metadata),
            "ModelConfig": one(pb.ModelConfigRequest, self._model_config),
            "ModelStatistics": one(pb.ModelStatisticsRequest, self._model_statistics),
            "RepositoryIndex": one(pb.RepositoryIndexRequest, self._index),
            "RepositoryModelLoad": one(pb.RepositoryModelLoadRequest, self._load),
            "RepositoryModelUnload": one(pb.RepositoryModelUnloadRequest, self._unload),
        }

    async def _live(self, _call: Call, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, _call: Call, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=not self._not_ready())

    async def _metadata(
        self, _call: Call, _: pb.ServerMetadataRequest
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name=_PLATFORM, version=__version__, extensions=_EXTENSIONS
        )

    async def _model_ready(
        self, call: Call, request: pb.ModelReadyRequest
    ) -> pb.ModelReadyResponse:
        """A cold model is ready: its first request is taken, and wakes it."""
        check_version(request.name, request.version)
        try:
            await known_model(self._asking, call, request.name)
        except Refused as refused:
            if refused.failure.status != _NOT_FOUND:
                raise
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def _model_metadata(
        self, call: Call, request: pb.ModelMetadataRequest
    ) -> pb.ModelMetadataResponse:
        check_version(request.name, request.version)
        await known_model(self._asking, call, request.name)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform=_PLATFORM,
            inputs=[tensor(name=name, datatype=kind, shape=[-1]) for name, kind in INPUTS],
            outputs=[
                tensor(name=name, datatype=_datatype(name), shape=_shape(name)) for name in OUTPUTS
            ],
        )

    async def _model_config(
        self, call: Call, request: pb.ModelConfigRequest
    ) -> pb.ModelConfigResponse:
        check_version(request.name, request.version)
        model = await known_model(self._asking, call, request.name)
        record = self._view.models.get(model.root)
        config = pb.ModelConfig(
            name=request.name,
            platform=_PLATFORM,
            backend=(record.spec.backend if record is not None else None) or "",
            input=[
                pb.ModelInput(name=name, data_type=_TYPES[kind], dims=[-1], optional=True)
                for name, kind in INPUTS
            ],
            output=[
                pb.ModelOutput(name=name, data_type=_TYPES[_datatype(name)], dims=_shape(name))
                for name in OUTPUTS
            ],
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        return pb.ModelConfigResponse(config=config)

    async def _model_statistics(
        self, call: Call, request: pb.ModelStatisticsRequest
    ) -> pb.ModelStatisticsResponse:
        if request.name:
            check_version(request.name, request.version)
            models = [await known_model(self._asking, call, request.name)]
        else:
            models = [*await known_models(self._asking, call)]
        return pb.ModelStatisticsResponse(
            model_stats=[_figures(model.id, self._statistics.of(model.root)) for model in models]
        )

    async def _index(
        self, call: Call, request: pb.RepositoryIndexRequest
    ) -> pb.RepositoryIndexResponse:
        _check_repository(request.repository_name)
        response = pb.RepositoryIndexResponse()
        for model in await known_models(self._asking, call):
            state = self._watching.status(model.root).state
            if state == READY:
                response.models.add(name=model.id, version=VERSION, state="READY")
            elif not request.ready:
                response.models.add(
                    name=model.id, version=VERSION, state="UNAVAILABLE", reason=state
                )
        return response

    async def _load(
        self, call: Call, request: pb.RepositoryModelLoadRequest
    ) -> pb.RepositoryModelLoadResponse:
        _check_repository(request.repository_name)
        _check_parameters(request.parameters)
        body = msgspec.json.encode(LoadModel(model=request.model_name))
        last = b""
        async with self._asking.ask(call, "POST", "/api/load", body) as response:
            async for line in response.lines():
                last = line
        event = msgspec.json.decode(last, type=LoadEvent) if last else None
        if event is not None and event.error is not None:
            raise error_of(event.error)
        if event is None or event.state != READY:
            raise BackendDied("the load was given up; ask again")
        return pb.RepositoryModelLoadResponse()

    async def _unload(
        self, call: Call, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        _check_repository(request.repository_name)
        _check_parameters(request.parameters)
        body = msgspec.json.encode(UnloadModel(model=request.model_name))
        await self._asking.whole(call, "POST", "/api/unload", body)
        return pb.RepositoryModelUnloadResponse()


def _figures(name: str, figures: Figures) -> pb.ModelStatistics:
    success = pb.StatisticDuration(count=figures.success, ns=int(figures.success_s * 1e9))
    fail = pb.StatisticDuration(count=figures.fail, ns=int(figures.fail_s * 1e9))
    return pb.ModelStatistics(
        name=name,
        version=VERSION,
        last_inference=figures.last_ms,
        inference_count=figures.success,
        execution_count=figures.success,
        inference_stats=pb.InferStatistics(success=success, fail=fail),
    )


def _datatype(output: str) -> str:
    return "FP32" if output == EMBEDDING else "BYTES"


def _shape(output: str) -> list[int]:
    return [-1, -1] if output == EMBEDDING else [-1]


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest("repository_name: there is one repository, and it has no name")


def _check_parameters(parameters: Mapping[str, object]) -> None:
    """A model's configuration and files are the management API's."""
    for key in parameters:
        if key not in _HARMLESS:
            raise InvalidRequest(f"the parameter {key[:100]!r} is not supported", param=key[:100])
