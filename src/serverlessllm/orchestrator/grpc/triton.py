"""`inference.GRPCInferenceService`: requests of the Open Inference Protocol, whole and streamed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

from serverlessllm.core.errors import Draining, InvalidRequest, ModelNotFound, SLLMError
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.grpc.asking import Asking, events, is_stream
from serverlessllm.orchestrator.grpc.calls import Call, Serve, one
from serverlessllm.orchestrator.grpc.proto.open_inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
)
from serverlessllm.orchestrator.grpc.statistics import Statistics
from serverlessllm.orchestrator.grpc.statuses import (
    CODE_TRAILER,
    Failure,
    Loading,
    Metadata,
    Refused,
    failure_of,
)
from serverlessllm.orchestrator.grpc.texts import Wanted, read_request, write_answer, write_nothing
from serverlessllm.orchestrator.rest.translating import translate
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.telemetry.logs import log

VERSION = "1"
"""Of every model: a revision is part of its name."""
_ID_CHARS_MAX = 1024
_FINAL = "triton_final_response"
_WANTS_EMPTY_FINAL = "triton_enable_empty_final_response"
_WANTS_STATUS = "triton_grpc_error"

_log = log("orchestrator")

Send = Callable[[ModelStreamInferResponse], Awaitable[None]]


class Triton:
    """`methods` by name: those that infer. `closing` is set when the listener closes."""

    def __init__(
        self,
        asking: Asking,
        settings: OrchestratorSettings,
        *,
        limits: RequestLimits,
        statistics: Statistics,
        closing: asyncio.Event,
    ) -> None:
        self._asking = asking
        self._limits = limits
        self._at_once_max = settings.grpc_requests_per_stream_max
        self._statistics = statistics
        self._closing = closing
        self.methods: dict[str, Serve] = {
            "ModelInfer": one(ModelInferRequest, self._infer),
            "ModelStreamInfer": self._stream_infer,
        }

    async def _infer(self, call: Call, request: ModelInferRequest) -> ModelInferResponse:
        wanted = await translate(request.ByteSize(), _read, request, self._limits)
        if wanted.stream:
            raise InvalidRequest("stream: ModelInfer gives one response; use ModelStreamInfer")
        with self._statistics.measured(request.model_name):
            data = await self._asking.whole(call, "POST", wanted.path, wanted.body)
            response = _response(request)
            write_answer(data, wanted, response)
        return response

    async def _stream_infer(self, call: Call) -> None:
        """Requests run side by side; each one's responses are in order, the last one marked."""
        await call.tell(())
        await _Stream(self._answer, call, self._at_once_max).run(self._closing)

    async def _answer(self, part: Part, request: ModelInferRequest, send: Send) -> None:
        """Send every response to one request of a stream.

        Raises:
            SLLMError, Refused: what went wrong.
        """
        wanted = await translate(request.ByteSize(), _read, request, self._limits)
        with self._statistics.measured(request.model_name):
            async with self._asking.ask(part, "POST", wanted.path, wanted.body) as answer:
                if is_stream(answer):
                    await _send_chunks(request, wanted, events(answer), send)
                else:
                    response = _response(request, final=True)
                    write_answer(await self._asking.read(answer), wanted, response)
                    await send(ModelStreamInferResponse(infer_response=response))


class Part:
    """One request of a stream, as the front door sees it."""

    def __init__(self, call: Call, number: int) -> None:
        self.id = f"{call.id}-{number}"
        self.said = call.said
        self.left_s = call.left_s

    async def tell(self, metadata: Metadata) -> None:
        """The stream has its initial metadata; a request of it has none."""


class _Stream:
    """One `ModelStreamInfer`: a reader, the requests that run, one writer."""

    def __init__(
        self,
        answer: Callable[[Part, ModelInferRequest, Send], Awaitable[None]],
        call: Call,
        at_once_max: int,
    ) -> None:
        self._answer = answer
        self._call = call
        self._places = asyncio.Semaphore(at_once_max)
        self._responses: asyncio.Queue[ModelStreamInferResponse | None] = asyncio.Queue(maxsize=1)
        self._by_status = call.said(_WANTS_STATUS) == "true"
        self._failed: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()

    async def run(self, closing: asyncio.Event) -> None:
        """Until the client has sent all and heard all.

        Raises:
            Refused: the stream ends with a status.
        """
        writer = asyncio.create_task(self._write(), name="grpc-stream-writer")
        closed = asyncio.create_task(closing.wait(), name="grpc-stream-closing")
        try:
            async with asyncio.TaskGroup() as requests:
                await self._read(requests, closed)
            await self._responses.put(None)
            await writer
        finally:
            for task in (writer, closed):
                task.cancel()
            await asyncio.gather(writer, closed, return_exceptions=True)
        if self._failed.done():
            raise Refused(self._failed.result())

    async def _read(self, requests: asyncio.TaskGroup, closed: asyncio.Task[bool]) -> None:
        """Start the requests, until there is no more, or no more is taken."""
        messages = self._call.requests(ModelInferRequest)
        for number in itertools.count(1):
            await self._places.acquire()
            coming = asyncio.ensure_future(_next(messages))
            try:
                await asyncio.wait(
                    (coming, closed, self._failed), return_when=asyncio.FIRST_COMPLETED
                )
                if not coming.done():
                    self._fail(failure_of(Draining("this server is shutting down; ask again")))
                    return
                request = coming.result()
            except SLLMError as error:  # not a message: what follows cannot be understood either
                self._fail(failure_of(error))
                return
            finally:
                coming.cancel()
            if request is None:
                return
            requests.create_task(self._serve(Part(self._call, number), request))

    async def _serve(self, part: Part, request: ModelInferRequest) -> None:
        try:
            await self._answer(part, request, self._responses.put)
        except (SLLMError, Refused) as error:
            await self._refuse(request, failure_of(error))
        except Exception:  # noqa: BLE001 - the boundary of a request
            _log.error("gRPC request failed by a bug", exc_info=True, request=part.id)
            await self._refuse(request, failure_of(SLLMError()))
        finally:
            self._places.release()

    async def _refuse(self, request: ModelInferRequest, failure: Failure) -> None:
        """Tell why a request failed: as the stream's status where the client wants that, else in
        a response, and the stream goes on."""
        if self._by_status:
            self._fail(failure)
            return
        response = _response(request, final=True)
        response.parameters[CODE_TRAILER].string_param = failure.fields.code
        await self._responses.put(
            ModelStreamInferResponse(
                error_message=failure.fields.message or failure.fields.code,
                infer_response=response,
            )
        )

    def _fail(self, failure: Failure) -> None:
        if not self._failed.done():
            self._failed.set_result(failure)

    async def _write(self) -> None:
        while (response := await self._responses.get()) is not None:
            await self._call.send(response)


async def _next(messages: AsyncIterator[ModelInferRequest]) -> ModelInferRequest | None:
    return await anext(messages, None)


async def _send_chunks(
    request: ModelInferRequest,
    wanted: Wanted,
    chunks: AsyncIterator[bytes | Loading],
    send: Send,
) -> None:
    """The final response is an empty one for a client that asks for that; else it is the chunk
    that says why the answer ended."""
    empty_final = request.parameters[_WANTS_EMPTY_FINAL].bool_param
    held: ModelInferResponse | None = None
    async for chunk in chunks:
        if isinstance(chunk, Loading):
            continue
        response = _response(request, final=False)
        says = write_answer(chunk, wanted, response)
        if not says.anything:
            continue
        if held is not None:
            await send(ModelStreamInferResponse(infer_response=held))
            held = None
        if says.the_end and not empty_final:
            held = response
        else:
            await send(ModelStreamInferResponse(infer_response=response))
    if held is None:
        held = _response(request)
        if not empty_final:
            write_nothing(wanted, held)
    held.parameters[_FINAL].bool_param = True
    await send(ModelStreamInferResponse(infer_response=held))


def _read(request: ModelInferRequest, limits: RequestLimits) -> Wanted:
    if len(request.id) > _ID_CHARS_MAX:  # it is in every response to the request
        raise InvalidRequest(f"id: at most {_ID_CHARS_MAX} characters", param="id")
    check_version(request.model_name, request.model_version)
    return read_request(request, limits)


def check_version(name: str, version: str) -> None:
    """Raise for a version that no model has, or a model without a name."""
    if not name:
        raise InvalidRequest("the name of the model is missing", param="model")
    if version not in {"", VERSION}:
        raise ModelNotFound(
            f"the model {name[:200]!r} has no version {version[:40]!r}: a revision is part of the "
            "name, name@revision",
            param="model_version",
        )


def _response(request: ModelInferRequest, *, final: bool | None = None) -> ModelInferResponse:
    response = ModelInferResponse(
        model_name=request.model_name, model_version=VERSION, id=request.id
    )
    if final is not None:
        response.parameters[_FINAL].bool_param = final
    return response
