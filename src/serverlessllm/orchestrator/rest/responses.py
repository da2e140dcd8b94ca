"""`/v1/responses`: asked as a chat, told as a response, kept for the next one."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from urllib.parse import parse_qs

import msgspec
from msgspec import Raw

from serverlessllm.core.clock import Clock, wall_s
from serverlessllm.core.errors import (
    InvalidRequest,
    MethodNotAllowed,
    RequestTooLarge,
    RouteNotFound,
)
from serverlessllm.edge.server import Request
from serverlessllm.edge.upstream import Response
from serverlessllm.openai.chats import (
    CHAT_PATH,
    COUNT_PATH,
    Chat,
    ChatUsage,
    Choice,
    Failure,
    Loading,
    failure_body,
    read_count,
)
from serverlessllm.openai.request import check_content_type
from serverlessllm.openai.responses.answer import ResponseObject, begun
from serverlessllm.openai.responses.assembly import Assembly
from serverlessllm.openai.responses.chat import to_chat, to_count, to_own_words
from serverlessllm.openai.responses.events import Event, error_frame
from serverlessllm.openai.responses.items import Item, ItemReference
from serverlessllm.openai.responses.request import Create, parse_create
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.openai.sse import typed_events
from serverlessllm.orchestrator.rest.front import Front
from serverlessllm.orchestrator.rest.kept import Kept, KeptItem, KeptResponses
from serverlessllm.orchestrator.rest.route import GET, Route
from serverlessllm.orchestrator.rest.translating import (
    JSON,
    OK,
    asked,
    refusal,
    tell,
    translate,
    whole_answer,
)
from serverlessllm.orchestrator.settings import OrchestratorSettings

PATH = "/v1/responses"
_PAGE_ITEMS = 20
_PAGE_ITEMS_MAX = 100
_PAGE_DIGITS_MAX = 3
_encoder = msgspec.json.Encoder()
_item = msgspec.json.Decoder(Item)


class _Deleted(msgspec.Struct, frozen=True):
    id: str
    object: str = "response"
    deleted: bool = True


class _Counted(msgspec.Struct, frozen=True):
    input_tokens: int
    object: str = "response.input_tokens"


class _Page(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: tuple[Raw, ...]
    first_id: str
    last_id: str
    has_more: bool


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request of which everything is known."""

    create: Create
    uid: str
    scope: bytes
    given: tuple[KeptItem, ...]
    """All that the model is asked, to be kept with its answer."""
    chat: Chat


class _Story:
    """A chat's stream as typed events; kept once it is whole."""

    def __init__(self, asked: _Asked, kept: KeptResponses) -> None:
        self._asked = asked
        self._kept = kept
        self._assembly = _assembly(asked)
        self._begun = False

    def wait(self, loading: Loading) -> bytes:
        return typed_events(self._begin() + self._assembly.wait(loading))

    def take(self, choice: Choice) -> bytes:
        return typed_events(self._begin() + self._assembly.take(choice))

    def end(self, usage: ChatUsage | None) -> bytes:
        events = self._begin() + self._assembly.end(usage, wall_s())
        keep(self._kept, self._asked, self._assembly.response)
        return typed_events(events)

    def fail(self, failure: Failure) -> bytes:
        failure = to_own_words(failure, self._asked.chat)
        if not self._begun:
            return error_frame(failure)
        return typed_events(self._assembly.fail(failure))

    def _begin(self) -> list[Event]:
        if self._begun:
            return []
        self._begun = True
        return self._assembly.begin()


class Responses:
    """The routes."""

    def __init__(
        self, settings: OrchestratorSettings, *, limits: RequestLimits, front: Front, clock: Clock
    ) -> None:
        self._settings = settings
        self._limits = limits
        self._front = front
        self.kept = KeptResponses(settings, clock)
        self.routes = (
            Route(path=PATH, methods=("POST",), serve=self._create),
            Route(path=f"{PATH}/input_tokens", methods=("POST",), serve=self._count),
            Route(
                path=f"{PATH}/",
                methods=("GET", "HEAD", "POST", "DELETE", "OPTIONS"),
                serve=self._serve_kept,
            ),
        )

    async def _create(self, request: Request) -> None:
        asking = await self._read(request)
        async with asked(self._front, request, CHAT_PATH, asking.chat.body) as response:
            if response.status != OK:
                await _refuse(request, response, asking.chat)
            elif asking.create.stream:
                story = _Story(asking, self.kept)
                await tell(request, response, story, self._settings.translated_bytes_max)
            else:
                await self._answer(request, response, asking)

    async def _answer(self, request: Request, response: Response, asking: _Asked) -> None:
        answer = await whole_answer(response, self._settings.translated_bytes_max)
        assembly = _assembly(asking)
        assembly.take(answer.choices[0])
        assembly.end(answer.usage, wall_s())
        keep(self.kept, asking, assembly.response)
        request.respond(OK, (JSON,), _encoder.encode(assembly.response))

    async def _count(self, request: Request) -> None:
        asking = await self._read(request, to_count)
        async with asked(self._front, request, COUNT_PATH, asking.chat.body) as response:
            if response.status != OK:
                await _refuse(request, response, asking.chat)
                return
            count = read_count(await response.read(self._settings.translated_bytes_max))
            request.respond(OK, (JSON,), _encoder.encode(_Counted(count)))

    async def _read(
        self,
        request: Request,
        write: Callable[[Create, Sequence[Item], Sequence[Item]], Chat] = to_chat,
    ) -> _Asked:
        """The request, with what it refers to."""
        check_content_type(request.headers.get("content-type"))
        body = await request.body()
        uid, scope = secrets.token_hex(16), scope_of(request)
        create = await translate(len(body), parse_create, body, self._limits, uid)
        before: tuple[KeptItem, ...] = ()
        if create.previous_response_id is not None:
            before = self.kept.previous(scope, create.previous_response_id).items
        referred = [
            self.kept.item(scope, item.id, f"input[{number}]")
            for number, item in enumerate(create.items)
            if isinstance(item, ItemReference)
        ]
        size_bytes = len(body) + self._check_size(create, before, referred)
        return await translate(size_bytes, _complete, create, uid, scope, before, referred, write)

    def _check_size(
        self, create: Create, before: Sequence[KeptItem], referred: Sequence[KeptItem]
    ) -> int:
        """Bytes of what is stored and asked again; small requests may refer to much.

        Raises:
            InvalidRequest, RequestTooLarge: it is too much.
        """
        items_max = self._limits.messages_max
        if len(before) + len(create.items) > items_max:
            raise InvalidRequest(
                f"input: at most {items_max} items, with those of the previous response",
                param="input",
            )
        size_bytes = sum(len(item.data) for item in (*before, *referred))
        bytes_max = self._settings.conversation_bytes_max
        if size_bytes > bytes_max:
            raise RequestTooLarge(
                f"the stored items that this request goes on from are more than {bytes_max} bytes"
            )
        return size_bytes

    async def _serve_kept(self, request: Request) -> None:
        """`GET`, `DELETE` of one response, `GET` of its input items."""
        response_id, slash, rest = request.path.removeprefix(f"{PATH}/").partition("/")
        if rest == "cancel" and request.method == "POST":
            self.kept.get(scope_of(request), response_id)
            raise InvalidRequest("only responses made in the background can be cancelled")
        if request.method == "POST" or (slash and rest != "input_items"):
            raise RouteNotFound(f"there is no {request.path[:200]}")
        allow = GET if rest else (*GET, "DELETE")
        if request.method not in allow:
            raise MethodNotAllowed(f"{request.path[:200]} takes GET", allow=allow)
        if rest:
            kept = self.kept.get(scope_of(request), response_id)
            request.respond(OK, (JSON,), _encoder.encode(page(kept.given, request.query)))
        elif request.method == "DELETE":
            self.kept.delete(scope_of(request), response_id)
            request.respond(OK, (JSON,), _encoder.encode(_Deleted(response_id)))
        else:
            if _query(request.query).get("stream", "false") != "false":
                raise InvalidRequest(
                    "stream: only a response made in the background is streamed again",
                    param="stream",
                )
            kept = self.kept.get(scope_of(request), response_id)
            request.respond(OK, (JSON,), kept.body)


def scope_of(request: Request) -> bytes:
    """Who asks: what one key stored is not there for another."""
    given = request.headers.get("authorization")
    key = given.partition(" ")[2].strip() if given else request.headers.get("x-api-key")
    return hashlib.sha256((key or "").encode()).digest()


def keep(kept: KeptResponses, asking: _Asked, response: ResponseObject) -> None:
    """Store what came of a request, if its client wants so."""
    if asking.create.store:
        kept.put(
            Kept(
                id=response.id,
                scope=asking.scope,
                body=_encoder.encode(response),
                given=asking.given,
                output=tuple(map(_kept_item, response.output)),
            )
        )


def page(items: tuple[KeptItem, ...], query: str) -> _Page:
    """One page of a listing: `limit`, `order`, `after`.

    Raises:
        InvalidRequest: one of them is none.
    """
    asked = _query(query)
    order, after = asked.get("order", "desc"), asked.get("after")
    limit = asked.get("limit", str(_PAGE_ITEMS))
    count = int(limit) if limit.isdecimal() and len(limit) <= _PAGE_DIGITS_MAX else 0
    if not 1 <= count <= _PAGE_ITEMS_MAX:
        raise InvalidRequest(f"limit: a number from 1 to {_PAGE_ITEMS_MAX}", param="limit")
    if order not in {"asc", "desc"}:
        raise InvalidRequest("order: say asc or desc", param="order")
    listed = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(listed) if item.id == after]
        if not places:
            raise InvalidRequest(f"after: no item is named {after[:200]!r}", param="after")
        listed = listed[places[-1] + 1 :]
    shown = listed[:count]
    return _Page(
        data=tuple(Raw(item.data) for item in shown),
        first_id=shown[0].id if shown else "",
        last_id=shown[-1].id if shown else "",
        has_more=len(listed) > count,
    )


def _complete(
    create: Create,
    uid: str,
    scope: bytes,
    before: tuple[KeptItem, ...],
    referred: Sequence[KeptItem],
    write: Callable[[Create, Sequence[Item], Sequence[Item]], Chat],
) -> _Asked:
    # One by one: a single piece of work would keep the event loop from the interpreter meanwhile.
    history = [_item.decode(item.data) for item in before]
    found = {item.id: _item.decode(item.data) for item in referred}
    items = tuple(
        found[item.id] if isinstance(item, ItemReference) else item for item in create.items
    )
    given = (*before, *map(_kept_item, items))
    return _Asked(
        create=create, uid=uid, scope=scope, given=given, chat=write(create, history, items)
    )


def _assembly(asking: _Asked) -> Assembly:
    return Assembly(begun(asking.create, f"resp_{asking.uid}", wall_s()), asking.uid)


def _kept_item(item: Item) -> KeptItem:
    return KeptItem(item.id, _encoder.encode(item))


async def _refuse(request: Request, response: Response, chat: Chat) -> None:
    failure, headers = await refusal(response)
    request.respond(failure.status, headers, failure_body(to_own_words(failure, chat)))


def _query(query: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(query).items()}
