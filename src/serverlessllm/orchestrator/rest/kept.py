"""Responses that were stored: bounded in number, bytes and time, each seen only by its own key.

They lie in this process's memory: a restart forgets them, another orchestrator does not know them.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from serverlessllm.core.clock import Clock
from serverlessllm.core.errors import ClientError
from serverlessllm.orchestrator.settings import OrchestratorSettings

_OVERHEAD_BYTES = 512
"""Of one response, beside its texts."""
_ITEM_OVERHEAD_BYTES = 256


class PreviousResponseNotFound(ClientError):
    """The response that this one continues is not kept (any more)."""

    status = 404
    code = "previous_response_not_found"


class ResponseNotFound(ClientError):
    """No such response is kept (any more)."""

    status = 404
    code = "response_not_found"


class ItemNotFound(ClientError):
    """No such item is kept (any more)."""

    status = 404
    code = "item_not_found"


class KeptItem(msgspec.Struct, frozen=True):
    """An item as its client may see it again."""

    id: str
    data: bytes
    """Its JSON."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A response and all that was said up to it, so that it outlives those before it."""

    id: str
    scope: bytes
    """Whose it is."""
    body: bytes
    """The response object's JSON."""
    given: tuple[KeptItem, ...]
    """What the model was asked, the responses before it included."""
    output: tuple[KeptItem, ...]

    @property
    def items(self) -> tuple[KeptItem, ...]:
        """The whole conversation."""
        return self.given + self.output

    @property
    def size_bytes(self) -> int:
        """What it takes of the budget."""
        texts = sum(len(item.data) + _ITEM_OVERHEAD_BYTES for item in self.items)
        return _OVERHEAD_BYTES + len(self.body) + texts


class KeptResponses:
    """The least recently used ones make room."""

    def __init__(self, settings: OrchestratorSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        """By id, the least recently used first."""
        self._ends_s: dict[str, float] = {}
        """By id, the oldest first."""
        self._items: dict[tuple[bytes, str], tuple[str, KeptItem]] = {}
        """By scope and id; with the latest response that has it."""
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, kept: Kept) -> None:
        """Keep a response; one that is larger than the whole budget is not kept."""
        self._forget_old()
        size_bytes = kept.size_bytes
        if size_bytes > self._settings.responses_bytes_max or not self._settings.responses_max:
            return
        while (
            len(self._kept) >= self._settings.responses_max
            or self.size_bytes + size_bytes > self._settings.responses_bytes_max
        ):
            self._drop(next(iter(self._kept)))
        self._kept[kept.id] = kept
        self._ends_s[kept.id] = self._clock.now_s() + self._settings.responses_ttl_s
        self.size_bytes += size_bytes
        for item in kept.items:
            self._items[kept.scope, item.id] = kept.id, item

    def get(self, scope: bytes, response_id: str) -> Kept:
        """Raises `ResponseNotFound`: gone, never there, or of another key."""
        self._forget_old()
        kept = self._kept.get(response_id)
        if kept is None or kept.scope != scope:
            raise ResponseNotFound(f"Response with id '{response_id[:200]}' not found.")
        self._kept.move_to_end(response_id)
        return kept

    def previous(self, scope: bytes, response_id: str) -> Kept:
        """The response that another one continues; raises `PreviousResponseNotFound`."""
        try:
            return self.get(scope, response_id)
        except ResponseNotFound as error:
            raise PreviousResponseNotFound(
                f"Previous response with id '{response_id[:200]}' not found.",
                param="previous_response_id",
            ) from error

    def item(self, scope: bytes, item_id: str, param: str) -> KeptItem:
        """An item of any response of this key; raises `ItemNotFound`."""
        self._forget_old()
        found = self._items.get((scope, item_id))
        if found is None:
            raise ItemNotFound(f"Item with id '{item_id[:200]}' not found.", param=param)
        return found[1]

    def delete(self, scope: bytes, response_id: str) -> None:
        """Raises `ResponseNotFound`."""
        self.get(scope, response_id)
        self._drop(response_id)

    def _forget_old(self) -> None:
        now_s = self._clock.now_s()
        while self._ends_s:
            oldest, ends_s = next(iter(self._ends_s.items()))
            if now_s < ends_s:
                return
            self._drop(oldest)

    def _drop(self, response_id: str) -> None:
        kept = self._kept.pop(response_id)
        del self._ends_s[response_id]
        self.size_bytes -= kept.size_bytes
        for item in kept.items:
            holder, _ = self._items.get((kept.scope, item.id), ("", None))
            if holder == response_id:
                del self._items[kept.scope, item.id]
