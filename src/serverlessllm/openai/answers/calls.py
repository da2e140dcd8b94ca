"""Tool calls: whole, and as they come in pieces."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Raw, UnsetType

from serverlessllm.openai.answers.failures import nonsense

_CALLS_MAX = 1024
"""Of one answer."""
_text = msgspec.json.Decoder(str)


class SaidFunction(msgspec.Struct):
    """As the engine says it; some give the arguments as an object."""

    name: str | None = None
    arguments: Raw = Raw(b"null")


class SaidCall(msgspec.Struct):
    """A call, or a piece of one."""

    index: Annotated[int, msgspec.Meta(ge=0)] | None = None
    id: str | None = None
    function: SaidFunction | None = None


class Function(msgspec.Struct):
    """What is called; in pieces, what is new of it."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class Call(msgspec.Struct):
    """A call; of a later piece, `index` and what is new."""

    function: Function
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


def whole_calls(said: list[SaidCall], name: str) -> list[Call]:
    """Of a whole answer; `name` makes ids where the engine gives none."""
    calls = []
    for place, call in enumerate(said):
        function = whole_function(call.function)
        identity = call.id or f"call_{name}_{place}"
        calls.append(Call(function=function, id=identity, type="function"))
    return calls


def whole_function(said: SaidFunction | None) -> Function:
    """Raises `BackendProtocolError` when nothing is named."""
    if said is None or not said.name:
        raise nonsense("a call names no function")
    return Function(said.name, arguments_text(said.arguments) or "{}")


def arguments_text(said: Raw) -> str:
    """JSON text, whichever way the engine gives it."""
    data = bytes(said)
    if data.startswith(b'"'):
        return _text.decode(data)
    return "" if data == b"null" else data.decode()


class _Open:
    """A call under way."""

    __slots__ = ("given", "named", "said")

    def __init__(self, given: str | None) -> None:
        self.given = given
        """The engine's id for it."""
        self.named = False
        self.said = False
        """Whether any arguments have come."""


class Calls:
    """The calls of one streamed choice: numbered in order, each named once, in its first piece."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[_Open] = []
        self._places: dict[int, int] = {}
        """By the engine's index."""

    def __bool__(self) -> bool:
        return bool(self._open)

    def take(self, said: SaidCall) -> Call | None:
        """What the client is told; None: nothing new.

        Raises:
            BackendProtocolError: too many calls.
        """
        function = said.function or SaidFunction()
        place = self._place(said, function.name)
        new = place == len(self._open)
        if new:
            if place >= _CALLS_MAX:
                raise nonsense(f"it has more than {_CALLS_MAX} tool calls")
            self._open.append(_Open(said.id))
        call = self._open[place]
        arguments = arguments_text(function.arguments)
        told = Function(arguments=arguments)
        if function.name and not call.named:
            call.named = True
            told.name = function.name
        elif not new and not arguments:
            return None
        call.said = call.said or bool(arguments)
        if not new:
            return Call(function=told, index=place)
        identity = said.id or f"call_{self._name}_{place}"
        return Call(function=told, index=place, id=identity, type="function")

    def finish(self) -> list[Call]:
        """Arguments for the calls that have had none: clients parse them as JSON."""
        return [
            Call(function=Function(arguments="{}"), index=place)
            for place, call in enumerate(self._open)
            if not call.said
        ]

    def _place(self, said: SaidCall, name: str | None) -> int:
        """Which call it is a piece of; the next free number for a new one."""
        last = len(self._open) - 1
        place = last if said.index is None else self._places.get(said.index, -1)
        if place >= 0:
            # Some engines number every call 0, some give every piece another id: only a name
            # with another id begins a call.
            given = self._open[place].given
            if not (name and self._open[place].named and said.id != given):
                return place
        if said.index is not None:
            self._places[said.index] = last + 1
        return last + 1
