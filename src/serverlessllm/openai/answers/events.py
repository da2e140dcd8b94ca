"""Server-sent events out of a stream of bytes that is cut anywhere."""

from __future__ import annotations

from serverlessllm.core.units import MIB

EVENT_BYTES_MAX = MIB
"""Of one event; what is longer is nonsense."""
_MARK = b"\xef\xbb\xbf"
"""A byte order mark may begin a stream."""


_LF = 10


class EventReader:
    """Knows every form that the standard allows: line ends of three kinds, an event's data over
    several lines, comments, other fields. A line `error: …` (llama.cpp) counts as data."""

    def __init__(self) -> None:
        self.too_long = False
        """Whether an event was longer than may be; nothing more is read then."""
        self._pieces: list[bytes] = []
        """Of a line whose end has not come."""
        self._lines: list[bytes] = []
        """Data of an event whose end has not come."""
        self._held_bytes = 0
        self._after_cr = False

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that is complete now."""
        # What comes is a whole event of one line nearly always, or some of them.
        size = len(data)
        if not self._held_bytes and data.startswith(b"data: ") and size <= EVENT_BYTES_MAX:
            if data.find(b"\n") == size - 2 and data[-1] == _LF and b"\r" not in data:
                return [data[6:-2]]
            events = _whole_events(data)
            if events is not None:
                return events
        if b"\n" not in data and b"\r" not in data:
            self._hold(self._pieces, data)
            return []
        return self._split(data)

    def _split(self, data: bytes) -> list[bytes]:
        text = b"".join((*self._pieces, data))
        self._held_bytes -= sum(map(len, self._pieces))
        self._pieces.clear()
        if self._after_cr and text.startswith(b"\n"):
            text = text[1:]
        self._after_cr = text.endswith(b"\r")
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        found: list[bytes] = []
        for line in lines:
            if line:
                self._take(line)
            elif self._lines:
                found.append(b"\n".join(self._lines))
                self._lines.clear()
                self._held_bytes = 0
            if self.too_long:
                return found
        self._hold(self._pieces, rest)
        return found

    def _take(self, line: bytes) -> None:
        name, _, value = line.removeprefix(_MARK).partition(b":")
        if name in {b"data", b"error"}:
            self._hold(self._lines, value.removeprefix(b" "))

    def _hold(self, kept: list[bytes], data: bytes) -> None:
        if data or kept is self._lines:
            kept.append(data)
            self._held_bytes += len(data)
            self.too_long = self._held_bytes > EVENT_BYTES_MAX


def _whole_events(data: bytes) -> list[bytes] | None:
    """Each event's data, if that is all there is, a line each."""
    if b"\r" in data or not data.endswith(b"\n\n"):
        return None
    events = data[:-2].split(b"\n\n")
    for event in events:
        if not event.startswith(b"data: ") or b"\n" in event:
            return None
    return [event[6:] for event in events]
