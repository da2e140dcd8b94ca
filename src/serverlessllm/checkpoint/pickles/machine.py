"""The state of a pickle that is being read: its stack, its marks, its memo, and their bounds."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, TypeVar

from serverlessllm.checkpoint.pickles.values import Value
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.units import MIB

MEMORY_BYTES_MAX: Final = 40 * MIB
"""Of what a pickle makes, by a generous estimate: a tensor takes about 1 KiB."""
MARKS_MAX: Final = 1_000
NAME_BYTES_MAX: Final = 256
WHERE_CHARS_MAX: Final = 200

ITEM_BYTES, NUMBER_BYTES, TEXT_BYTES = 10, 40, 64
TUPLE_BYTES, LIST_BYTES, DICT_BYTES, OBJECT_BYTES = 64, 96, 96, 128
DICT_ITEM_BYTES = 100
NAME_BYTES = 512
"""More than it takes: a pickler memoizes a name, and a look at one is slow."""

Container = TypeVar("Container", list[Value], dict[Value, Value])


class Machine:
    """Reads arguments and keeps values. Whatever it is asked for and cannot give is an error:

    an IndexError where the stack or the data is too short, a CheckpointError for the rest.
    """

    __slots__ = ("_frame_end", "_left_bytes", "_marks", "_memo", "data", "position", "stack")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Value] = []
        """What was pushed since the last mark."""
        self._marks: list[list[Value]] = []
        self._memo: list[Value] = []
        self._frame_end = 0
        self._left_bytes = MEMORY_BYTES_MAX

    def take(self, size: int) -> bytes:
        """The next bytes of the pickle."""
        start = self.position
        end = start + size
        if end > len(self.data):
            raise CheckpointError(f"{size} bytes are more than follow")
        self.position = end
        return self.data[start:end]

    def byte(self) -> int:
        """An unsigned argument of one byte."""
        value = self.data[self.position]
        self.position += 1
        return value

    def number(self, size: int) -> int:
        """An unsigned argument of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """Text up to a newline, as GLOBAL has it."""
        end = self.data.find(b"\n", self.position, self.position + NAME_BYTES_MAX + 1)
        if end < 0:
            raise CheckpointError(f"a name without end, or of more than {NAME_BYTES_MAX} bytes")
        text = self.take(end - self.position)
        self.position += 1
        return decode(text)

    def begin_frame(self) -> None:
        """Frames only say how much to read ahead; one that lies is no pickler's."""
        size = self.number(8)
        if self.position < self._frame_end:
            raise CheckpointError("a frame inside of a frame")
        if size > len(self.data) - self.position:
            raise CheckpointError(f"a frame of {size} bytes, more than follow")
        self._frame_end = self.position + size

    def charge(self, size_bytes: int) -> None:
        """Count memory that the pickle makes us take. Nothing is ever given back."""
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise CheckpointError(f"it describes more than {MEMORY_BYTES_MAX} bytes of objects")

    def push(self, value: Value, size_bytes: int) -> None:
        """Push what takes memory of its own."""
        self.charge(size_bytes)
        self.stack.append(value)

    def top(self, type_: type[Container]) -> Container:
        """The list or dict on top of the stack, which is to be added to."""
        target = self.stack[-1]
        if type(target) is not type_:
            raise CheckpointError(f"adds items to something that is not a {type_.__name__}")
        return target

    def mark(self) -> None:
        """Begin a stack of its own."""
        if len(self._marks) >= MARKS_MAX:
            raise CheckpointError(f"nested deeper than {MARKS_MAX}")
        self._marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Value]:
        """What was pushed since the last mark."""
        items, self.stack = self.stack, self._marks.pop()
        return items

    def memoize(self, number: int | None = None) -> None:
        """Keep the top of the stack. Picklers number these without gaps, so a list does."""
        value = self.stack[-1]
        memo = self._memo
        if number is None or number == len(memo):
            self.charge(ITEM_BYTES)
            memo.append(value)
        elif number < len(memo):
            memo[number] = value
        else:
            raise CheckpointError(f"memo entry {number} is set before entry {len(memo)}")

    def recall(self, number: int) -> None:
        """Push an entry of the memo."""
        if number >= len(self._memo):
            raise CheckpointError(f"memo entry {number} was never set")
        self.stack.append(self._memo[number])

    def where(self) -> str:
        """`, at 'config'/'lr'`: the keys that lead to what is read now, as far as can be told."""
        keys: list[Value] = []
        above: list[Value] = []
        for level in (*self._marks, self.stack):
            in_dict = above and level and type(above[-1]) is dict
            # Keys and values by turns, the last of them not done yet.
            first = (len(level) - 1) // 2 * 2 if in_dict else 0
            keys += level[first : first + 1] if in_dict else []
            keys += [key for made, key in pairwise(level[first:]) if type(made) is dict]
            above = level
        shown = "/".join(ascii(key[:40]) for key in keys if isinstance(key, str))
        return f", at {shown[:WHERE_CHARS_MAX]}" if shown else ""

    def finish(self) -> Value:
        """The one thing that was made."""
        if self._marks or len(self.stack) != 1:
            raise CheckpointError("it does not end with one thing on its stack")
        return self.stack[0]


def decode(data: bytes) -> str:
    """Text of a pickle."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise CheckpointError("a text is not UTF-8") from None
