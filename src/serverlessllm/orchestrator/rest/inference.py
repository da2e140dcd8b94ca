"""`/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`: lease, relay, retry, wait."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from serverlessllm.core.agentapi import (
    KEEP_ALIVE_HEADER,
    MODEL_HEADER,
    REFUSED_HEADER,
    TOKEN_HEADER,
)
from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import BackendDied, ModelNotReady, NoCapacity, SLLMError
from serverlessllm.edge.link import Link
from serverlessllm.edge.relay import relay, relay_whole
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import (
    Exchange,
    Response,
    UpstreamBusy,
    UpstreamError,
    Upstreams,
    UpstreamUnreachable,
)
from serverlessllm.openai.nesting import LONG_BYTES
from serverlessllm.openai.request import ParsedRequest, check_content_type
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.openai.sse import EVENT_STREAM_HEADERS, error_event
from serverlessllm.orchestrator.agents import refusal
from serverlessllm.orchestrator.coldstart import WaitingRoom
from serverlessllm.orchestrator.loads import note_schedule_error, on_demand_spec
from serverlessllm.orchestrator.rest.call import Call
from serverlessllm.orchestrator.rest.cold import ColdStarts
from serverlessllm.orchestrator.rest.guard import caller_of
from serverlessllm.orchestrator.rest.loading import (
    Wishes,
    read_wishes,
)
from serverlessllm.orchestrator.rest.quota import tokens_used
from serverlessllm.orchestrator.router import Lease, Router
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.orchestrator.view import ClusterView
from serverlessllm.telemetry.table import REQUEST_RETRIES

Parse = Callable[[bytes, RequestLimits], ParsedRequest]

_OK: Final = 200
_REFUSED: Final = f"\r\n{REFUSED_HEADER}: ".encode()
_DIED: Final = "the model's server went away during the answer; send the request again"
_DIED_EVENT: Final = error_event(BackendDied(_DIED))


class Inference:
    """The hot path. Its only state: how many requests are being tried again."""

    def __init__(
        self,
        settings: OrchestratorSettings,
        *,
        limits: RequestLimits,
        view: ClusterView,
        router: Router,
        room: WaitingRoom,
        upstreams: Upstreams,
        clock: Clock,
        token: str,
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._view = view
        self._router = router
        self._room = room
        self._upstreams = upstreams
        self._clock = clock
        self._cold = ColdStarts(settings, view=view, router=router, room=room, clock=clock)
        self._fixed_head = (
            f"content-type: application/json\r\n{TOKEN_HEADER}: {token}\r\n{MODEL_HEADER}: "
        ).encode()
        self._retrying = 0

    def ask(self, request: Request, parse: Parse) -> Call | None:
        """Take a whole request, and send it to a ready agent if nothing has to be waited for:
        `finish` is to be called at the answer's head (at once without a link), or `give_up`. None:
        it is one for `answer`.

        Raises:
            SLLMError: `answer` will, too.
        """
        body = request.whole
        if body is None or len(body) > LONG_BYTES:
            return None
        wishes = _wishes_of(request)
        call = self._call(request, parse(body, self._limits), body, wishes)
        self._admit(call)
        lease = call.lease = self._lease(call)
        if lease is not None:
            lease.take()
            exchange = call.exchange = self._exchange(call, lease)
            call.link = exchange.begin()
        return call

    def finish(self, call: Call) -> bool:
        """Pass the answer on if it is whole; else `go_on` is to be called."""
        link, exchange, lease = call.link, call.exchange, call.lease
        if link is None or exchange is None or lease is None:
            return False
        if _refuses(link) or not relay_whole(call.request, link):
            return False
        call.status = link.status
        call.timing.first_byte_s = self._clock.now_s()
        self._note_usage(call, link)
        self._note_times(call, lease)
        exchange.finish()
        lease.give_back()
        self._close(call)
        return True

    def give_up(self, call: Call) -> None:
        """Nobody wants the answer to what was asked."""
        if call.exchange is not None and call.lease is not None:
            call.exchange.finish()
            call.lease.give_back()
        self._close(call)

    async def answer(self, request: Request, parse: Parse) -> int:
        """Serve one request to its end; the answer's status. Its `Timing` is `request.state`.

        Raises:
            SLLMError: nothing was answered, or only comments were (`request.started`).
        """
        wishes = _wishes_of(request)
        body = request.whole
        if body is None:
            body = await request.body()
        if len(body) <= LONG_BYTES:
            parsed = parse(body, self._limits)
        else:
            parsed = await asyncio.to_thread(parse, body, self._limits)
        call = self._call(request, parsed, body, wishes)
        self._admit(call)
        return await self.go_on(call)

    async def go_on(self, call: Call) -> int:
        """Serve a request to its end, from wherever it is; as `answer`."""
        try:
            while True:
                lease = call.lease or self._lease(call)
                if await (self._wake(call) if lease is None else self._forward(call, lease)):
                    return call.status
                await self._before_retry(call)
        finally:
            self._close(call)

    def _call(self, request: Request, parsed: ParsedRequest, body: bytes, wishes: Wishes) -> Call:
        """Who asks for which model; raises when it may not, or there is none."""
        caller, names = caller_of(request), self._view.names
        model = names.get(parsed.model)
        if caller is not None:
            caller.check_model(model or parsed.model, names)
            names = caller.usable(names) if model is None else names
        if model is None:
            model = on_demand_spec(parsed.model, self._settings, self._view, names).model
        return Call(request, parsed, model, body, wishes)

    def _admit(self, call: Call) -> None:
        """Take it from what its key has left; raises when that is too little."""
        caller = caller_of(call.request)
        if caller is not None and caller.usage is not None:
            call.admission = caller.usage.admit(len(call.body), call.parsed.answer_tokens_max)

    def _close(self, call: Call) -> None:
        self._end_retry(call)
        if call.admission is not None:
            # Who leaves while an agent answers has used tokens that nobody will tell of.
            left = bool(call.timing.sent_s) and not call.request.connected
            call.admission.close(answered=call.status == _OK or left)

    def _lease(self, call: Call) -> Lease | None:
        """The best ready agent for it, if there is one."""
        chosen_s = self._clock.now_s()
        lease = self._router.lease(call.model, call.avoid)
        if lease is not None:
            call.timing.place_s = self._clock.now_s() - chosen_s
            if lease.scale_out:
                self._room.hold(call.model, elsewhere=True)
        return lease

    async def _wake(self, call: Call) -> bool:
        """No agent is ready: have one load the model, then as `_forward`."""
        self._end_retry(call)
        lease, waiter = await self._cold.lease(call)
        if waiter.incomplete:
            return await self._cold.beside(call, waiter, self._forward(call, lease))
        return await self._forward(call, lease)

    async def _forward(self, call: Call, lease: Lease) -> bool:
        """Ask one agent, if that has not been done; whether the client has its answer."""
        exchange = call.exchange or self._exchange(call, lease)
        call.lease = call.exchange = None
        try:
            with lease:
                async with exchange as response:
                    if _refuses(response.link):
                        await self._note_refusal(call, lease, response)
                        return False
                    await self._pass_on(call, lease, response)
                    return True
        except UpstreamBusy as busy:
            call.error = busy
            call.refused |= {lease.agent}
            return False
        except UpstreamError as error:
            return self._lost(call, lease, error)

    def _exchange(self, call: Call, lease: Lease) -> Exchange:
        call.timing.sent_s = self._clock.now_s()
        return self._upstreams.send(
            lease.address, "POST", call.request.path, self._head(call), call.body
        )

    def _lost(self, call: Call, lease: Lease, error: SLLMError) -> bool:
        """The agent went away; whether that was in the middle of the client's answer."""
        self._view.failed(lease.agent)
        self._room.not_ready(call.model, lease.agent)
        call.error = error
        call.gone |= {lease.agent}
        return call.request.finished

    async def _pass_on(self, call: Call, lease: Lease, response: Response) -> None:
        request, timing = call.request, call.timing
        call.status = response.status
        self._end_retry(call)
        if request.started and response.status != _OK:
            raise await refusal(response)
        if call.begun is not None and call.parsed.stream:
            # The relay has to know whether the head is out: it is the load's from here on.
            if response.status != _OK:
                call.begin()
            elif not request.started:
                request.start(_OK, EVENT_STREAM_HEADERS)

        def first_byte() -> None:
            timing.first_byte_s = self._clock.now_s()
            call.begin()

        try:
            relayed = await relay(
                request, response, error_event=_DIED_EVENT, on_first_byte=first_byte
            )
        finally:
            self._note_usage(call, response.link)
        if not relayed.ok:
            self._view.failed(lease.agent)
        self._note_times(call, lease)

    def _note_usage(self, call: Call, link: Link) -> None:
        """The answer has ended, or broken off: count its tokens."""
        used = tokens_used(link.head, link.trailers)
        if used is None:
            if call.admission is not None:
                call.admission.broke_off(link.passed_bytes)
            return
        call.timing.used = used
        if call.admission is not None:
            call.admission.settle(sum(used))

    def _note_times(self, call: Call, lease: Lease) -> None:
        timing = call.timing
        # Only a stream's first byte is its first token.
        if not call.parsed.stream or not timing.first_byte_s or timing.loaded is not None:
            return
        ttft_s = timing.first_byte_s - timing.sent_s
        note_schedule_error(lease.predicted_s, ttft_s)
        if lease.idle:
            self._router.learn_first_token(call.model, ttft_s)

    async def _note_refusal(self, call: Call, lease: Lease, response: Response) -> None:
        """The agent did nothing: note why, so that the next try goes elsewhere."""
        call.error = await refusal(response)
        if call.error.code == ModelNotReady.code:
            self._view.lost(lease.agent, call.model)
            self._room.not_ready(call.model, lease.agent)
        else:
            call.refused |= {lease.agent}

    async def _before_retry(self, call: Call) -> None:
        """Return if the request may be tried once more; else raise why the last try failed."""
        error = call.error or NoCapacity()
        call.tries += 1
        if call.tries > self._settings.retries_max or error.permanent:
            raise error
        # What reached nobody is no load when it is sent elsewhere, and what found no model waits
        # for one: neither takes a place in the budget.
        free = isinstance(error, UpstreamUnreachable) or error.code == ModelNotReady.code
        if not (call.retrying or free):
            share = self._settings.retry_share * self._router.in_flight
            if self._retrying >= max(self._settings.retry_min, share):
                raise error
            call.retrying = True
            self._retrying += 1
        REQUEST_RETRIES.inc(error.code)
        pause_s = random.uniform(0, self._settings.retry_jitter_s)  # noqa: S311 - not a secret
        await self._clock.sleep(pause_s)

    def _end_retry(self, call: Call) -> None:
        if call.retrying:
            call.retrying = False
            self._retrying -= 1

    def _head(self, call: Call) -> bytes:
        """The header lines for the agent."""
        parsed, model = call.parsed, call.model
        more = b""
        if parsed.keep_alive_s is not None:
            more = f"{KEEP_ALIVE_HEADER}: {parsed.keep_alive_s}\r\n".encode()
        if call.narrator is not None:
            more += call.narrator.agent_head
        return b"%b%b\r\nx-request-id: %b\r\n%b" % (
            self._fixed_head,
            model.encode(),
            call.request.id_bytes,
            more,
        )


def _refuses(link: Link) -> bool:
    """Whether the agent says that it did nothing. (`in` would first try a number, and fail.)"""
    return link.head.find(_REFUSED) >= 0


def _wishes_of(request: Request) -> Wishes:
    """What its headers say, once for all requests of a connection that have the same ones."""
    headers = request.headers
    wishes = headers.reading
    if not isinstance(wishes, Wishes):
        check_content_type(headers.get("content-type"))
        wishes = headers.reading = read_wishes(headers)
    return wishes
