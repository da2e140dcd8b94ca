"""Tool calls found in an answer's text as it comes.

For engines that leave that to us: transformers, and llama.cpp where its own way does not hold.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence

import msgspec

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_NAME = r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")'
_NAMED = re.compile(_NAME)
_BEGUN = re.compile(_NAME + r'\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_FIRST_KEY = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"')
_CALL_KEYS = re.compile(r'\s*\{\s*"(?:name|type|arguments|parameters)"')
_AROUND = " \t\r\n,;[]}"
"""What may stand between calls, and behind the last one's arguments."""
_SPECIAL = re.compile(r'["{}\[\]\\]')


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said next of an answer: text, or a part of a call."""

    text: str = ""
    call: int | None = None
    """The number of the call that this is a part of."""
    name: str | None = None
    """On a call's first part."""
    arguments: str = ""


def delta_fields(deltas: Sequence[Delta]) -> dict[str, object]:
    """A chat chunk's `delta`, but for its role."""
    fields: dict[str, object] = {}
    text = "".join(delta.text for delta in deltas)
    if text:
        fields["content"] = text
    parts = [{"index": delta.call} | _call(delta) for delta in _joined(deltas)]
    return fields | ({"tool_calls": parts} if parts else {})


def message_fields(deltas: Sequence[Delta]) -> dict[str, object]:
    """A whole chat's `message`, but for its role."""
    text = "".join(delta.text for delta in deltas)
    calls = [_call(delta) for delta in _joined(deltas)]
    return {"content": text or None, "tool_calls": calls} if calls else {"content": text}


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    """The parts of calls, those of the same call in one."""
    calls: dict[int, Delta] = {}
    for delta in deltas:
        if delta.call is None:
            continue
        before = calls.get(delta.call)
        calls[delta.call] = (
            delta
            if before is None
            else msgspec.structs.replace(before, arguments=before.arguments + delta.arguments)
        )
    return list(calls.values())


def _call(delta: Delta) -> dict[str, object]:
    if delta.name is None:
        return {"function": {"arguments": delta.arguments}}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class Calls:
    """Finds calls in an answer's text as it comes.

    Knows `<tool_call>{…}</tool_call>` (Hermes, Qwen) anywhere, and an answer that is nothing but
    calls in JSON (Llama 3; Mistral's list), with `arguments` or `parameters`. Only the tools of
    the request are calls: other JSON stays text.
    """

    def __init__(self, names: Sequence[str], *, listed_only: bool = False) -> None:
        """Without names all is text. `listed_only`: the answer was made to be calls in JSON, and
        has no tags."""
        self._names = frozenset(names)
        self.count = 0
        """Calls so far."""
        self._kept = ""
        self._said = False
        self._tagged = False
        self._listed_only = self._bare = listed_only
        self._call: _Arguments | None = None

    def push(self, text: str, *, whole: bool = False) -> list[Delta]:
        """What the new text lets one say; `whole`: it was the last."""
        if not self._names:
            return [Delta(text=text)] if text else []
        self._kept += text
        deltas = list(self._parts(whole))
        if whole and self._call is None and not self._listed_only and self._kept.strip(_AROUND):
            # A call that was cut off before it had a name is no call.
            deltas.append(Delta(text=(_OPEN if self._tagged else "") + self._kept))
        return deltas

    def _parts(self, whole: bool) -> Iterator[Delta]:
        while self._kept:
            before = self._kept, self._call, self._tagged, self._bare
            if self._call is not None:
                yield from self._arguments()
            elif self._tagged or self._bare:
                yield from self._begin()
            else:
                yield from self._text(whole)
            if before == (self._kept, self._call, self._tagged, self._bare):
                return

    def _text(self, whole: bool) -> Iterator[Delta]:
        """Text until a call begins."""
        kept = self._kept
        if not self._said:
            start = kept.lstrip()
            if start[:1] in {"{", "["}:
                begins = self._begins(start.lstrip("[").lstrip())
                if begins or (begins is None and not whole):
                    self._bare = begins is True
                    return
        at = kept.find(_OPEN)
        if at >= 0:
            said, self._kept = kept[:at].rstrip(), kept[at + len(_OPEN) :]
            self._tagged = True
        elif whole:
            said, self._kept = kept.rstrip() if self.count else kept, ""
        else:  # white space before a call is not said
            said = kept[: len(kept) - _overlap(_OPEN, kept)].rstrip()
            self._kept = kept[len(said) :]
        if said:
            self._said = True
            yield Delta(text=said)

    def _begins(self, start: str) -> bool | None:
        """Whether this JSON is a call; None: too short to tell."""
        named = _NAMED.match(start)
        if named is not None:
            return _word(named[1]) in self._names
        if _FIRST_KEY.match(start) is None:
            return None
        if _CALL_KEYS.match(start) is None:
            return False
        end = _end(start, 0)
        if end is None:
            return None
        name = _whole_call(start[:end])
        return name is not None and name[0] in self._names

    def _begin(self) -> Iterator[Delta]:
        """A call's first part, within tags or in an answer that is nothing but calls."""
        kept = self._kept
        place = len(kept) - len(kept.lstrip(_AROUND))
        if self._tagged and kept[place:].startswith(_CLOSE):
            self._kept = kept[place + len(_CLOSE) :]
            self._tagged = False
            return
        begun = _BEGUN.match(kept, place)
        if begun is not None:
            name = _word(begun[1])
            self._kept = kept[begun.end() :]
            self._call = _Arguments(self.count)
            self.count += 1
            yield Delta(call=self._call.number, name=name)
            return
        end = _end(kept, place) if kept[place : place + 1] == "{" else None
        if end is not None:  # the arguments first, or none at all
            found = _whole_call(kept[place:end])
            self._kept = kept[end:]
            if found is not None:
                yield Delta(call=self.count, name=found[0], arguments=found[1])
                self.count += 1
        elif kept[place : place + 1] not in {"", "{", "<"}:
            if self._tagged:  # words where a call should be
                yield Delta(text=_OPEN)
            self._tagged = self._bare = False
            self._said = True

    def _arguments(self) -> Iterator[Delta]:
        """More of the arguments of the call at hand."""
        call = self._call
        assert call is not None
        end = call.scan(self._kept)
        if end is None:
            said, self._kept = self._kept, ""
        else:
            said, self._kept = self._kept[:end], self._kept[end:]
            self._call = None
        if said:
            yield Delta(call=call.number, arguments=said)


class _Arguments:
    """Where an object of JSON ends that comes in pieces."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def scan(self, text: str) -> int | None:
        """The place behind its last brace; None: it goes on."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = _SPECIAL.search(text, at)
            if found is None:
                return None
            at = found.end()
            character = found[0]
            if self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return at
        return None


def _end(text: str, at: int) -> int | None:
    """The place behind the object that begins at `at`."""
    end = _Arguments(0).scan(text[at:])
    return None if end is None else at + end


def _whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is all there."""
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    inner = found.get("function", found)
    found = inner if isinstance(inner, dict) else found
    name = found.get("name")
    if not isinstance(name, str):
        return None
    given = found.get("arguments", found.get("parameters", {}))
    arguments = given if isinstance(given, str) else msgspec.json.encode(given).decode()
    return name, arguments


def _word(quoted: str) -> str:
    try:
        return msgspec.json.decode(quoted, type=str)
    except msgspec.DecodeError:
        return ""


def _overlap(mark: str, text: str) -> int:
    """Characters at the end of `text` that `mark` begins with."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
