"""Pickle opcodes, protocols 2 to 5, that build descriptions of tensors: nothing is executed.

Known are the opcodes that `torch.save` writes for a state dict, and the names in `builders`; all
else is refused. Nothing is imported, nothing is called but those builders, nothing recurses, and
the number of steps and the memory are bounded. Reference: CPython's `Lib/pickletools.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from serverlessllm.checkpoint.pickles import machine as costs
from serverlessllm.checkpoint.pickles.builders import check_global, reduce, set_state, storage_of
from serverlessllm.checkpoint.pickles.machine import Machine, decode
from serverlessllm.checkpoint.pickles.opcodes import OPCODE_NAMES
from serverlessllm.checkpoint.pickles.state import state_dict_of
from serverlessllm.checkpoint.pickles.values import Global, StateDict, Value
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.core.units import MIB

PICKLE_BYTES_MAX: Final = 16 * MIB
STEPS_MAX: Final = 1_200_000
"""Opcodes: a tensor takes about 35."""
TEXT_BYTES_MAX: Final = 1 * MIB
LONG_BYTES_MAX: Final = 9
"""64 bits and a sign."""
KEY_CHARS_MAX: Final = 4096

_NUMBERS = frozenset({int, float})
_CONSTANTS = frozenset({bool, type(None)})

_INT32 = struct.Struct("<i")

Handler = Callable[[Machine], None]


def read_state_dict(data: bytes) -> StateDict:
    """The tensors that a pickle describes.

    At most about 1 s and 64 MiB beyond `data`, whatever `data` is, and free of effects.

    Raises:
        UnsupportedCheckpoint: an opcode, a name or a thing that is not of a plain state dict;
            says which, and at which byte.
        CheckpointError: not a valid pickle, or over a bound.
    """
    if len(data) > PICKLE_BYTES_MAX:
        raise CheckpointError(f"a pickle of {len(data)} bytes, more than {PICKLE_BYTES_MAX}")
    return state_dict_of(_run(data))


def _run(data: bytes) -> Value:
    if data[:1] != b"\x80":
        raise CheckpointError("not a pickle of protocol 2 to 5")
    machine, start = Machine(data), 0
    try:
        for _ in range(STEPS_MAX):
            start = machine.position
            code = data[start]
            machine.position = start + 1
            if code == _STOP:
                return _finished(machine)
            handler = _HANDLERS.get(code)
            if handler is None:
                raise UnsupportedCheckpoint(
                    f"opcode {OPCODE_NAMES.get(code, hex(code))}, which no plain state dict needs"
                )
            handler(machine)
    except IndexError:
        raise CheckpointError(
            f"byte {start} of the pickle: it ends early, or takes what was never pushed"
        ) from None
    except CheckpointError as error:
        where = f"byte {start} of the pickle{machine.where()}"
        raise type(error)(f"{where}: {error.message}") from None
    raise CheckpointError(f"a pickle of more than {STEPS_MAX} opcodes")


def _finished(machine: Machine) -> Value:
    if machine.position != len(machine.data):
        raise CheckpointError("bytes follow its end")
    return machine.finish()


def _protocol(machine: Machine) -> None:
    version = machine.number(1)
    if not 2 <= version <= 5:
        raise UnsupportedCheckpoint(f"pickle protocol {version}, but 2 to 5 are read")


def _text(size_bytes: int) -> Handler:
    """BINUNICODE, with a size of `size_bytes`."""

    def push_text(machine: Machine) -> None:
        size = machine.number(size_bytes)
        if size > TEXT_BYTES_MAX:
            raise CheckpointError(f"a text of {size} bytes, more than {TEXT_BYTES_MAX}")
        text = decode(machine.take(size))
        machine.push(text, costs.TEXT_BYTES + (size if text.isascii() else 4 * size))

    return push_text


def _bytes(size_bytes: int) -> Handler:
    def push_bytes(machine: Machine) -> None:
        size = machine.number(size_bytes)
        if size > TEXT_BYTES_MAX:
            raise CheckpointError(f"{size} bytes in one piece, more than {TEXT_BYTES_MAX}")
        machine.push(machine.take(size), costs.TEXT_BYTES + size)

    return push_bytes


def _long(size_bytes: int) -> Handler:
    def push_long(machine: Machine) -> None:
        size = machine.number(size_bytes)
        if size > LONG_BYTES_MAX:
            raise CheckpointError(f"a number of {size} bytes, more than {LONG_BYTES_MAX}")
        value = int.from_bytes(machine.take(size), "little", signed=True)
        machine.push(value, costs.NUMBER_BYTES)

    return push_long


def _int8(machine: Machine) -> None:
    machine.push(machine.byte(), costs.ITEM_BYTES)


def _int16(machine: Machine) -> None:
    machine.push(machine.number(2), costs.NUMBER_BYTES)


def _int32(machine: Machine) -> None:
    machine.push(_INT32.unpack(machine.take(4))[0], costs.NUMBER_BYTES)


def _float(machine: Machine) -> None:
    machine.push(struct.unpack(">d", machine.take(8))[0], costs.NUMBER_BYTES)


def _constant(value: Value) -> Handler:
    def push_constant(machine: Machine) -> None:
        machine.push(value, costs.ITEM_BYTES)

    return push_constant


def _empty_list(machine: Machine) -> None:
    machine.push([], costs.LIST_BYTES)


def _empty_dict(machine: Machine) -> None:
    machine.push({}, costs.DICT_BYTES)


def _tuple(count: int) -> Handler:
    """TUPLE1 to TUPLE3."""

    def push_tuple(machine: Machine) -> None:
        stack = machine.stack
        if len(stack) < count:
            raise IndexError
        items = tuple(stack[-count:])
        del stack[-count:]
        machine.push(items, costs.TUPLE_BYTES + 8 * count)

    return push_tuple


def _tuple_from_mark(machine: Machine) -> None:
    items = tuple(machine.pop_mark())
    machine.push(items, costs.TUPLE_BYTES + 8 * len(items))


def _append(machine: Machine) -> None:
    value = machine.stack.pop()
    machine.charge(costs.ITEM_BYTES)
    machine.top(list).append(value)


def _appends(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.charge(costs.ITEM_BYTES * len(items))
    machine.top(list).extend(items)


def _set_item(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _set(machine, [key, value])


def _set_items(machine: Machine) -> None:
    _set(machine, machine.pop_mark())


def _set(machine: Machine, items: list[Value]) -> None:
    if len(items) % 2:
        raise CheckpointError("a key without a value")
    machine.charge(costs.DICT_ITEM_BYTES * (len(items) // 2))
    target = machine.top(dict)
    for number in range(0, len(items), 2):
        target[_key(items[number])] = items[number + 1]


def _key(key: Value) -> Value:
    """What stands for a key: of a stranger's choice, so that dicts stay fast whatever it is.

    The hash of a number is not salted: numbers can be chosen that collide, and become digits. Equal
    texts are compared byte by byte, each time: they are short. The hash of a tuple recurses: a deep
    one would end the process.
    """
    if isinstance(key, str | bytes):
        if len(key) > KEY_CHARS_MAX:
            raise CheckpointError(f"a dict has a key of {len(key)} characters")
        return key
    if type(key) in _NUMBERS:
        return repr(key).encode()
    if type(key) not in _CONSTANTS:
        raise UnsupportedCheckpoint("a dict has keys that are not plain values")
    return key


def _global(machine: Machine) -> None:
    module, name = machine.line(), machine.line()
    _push_global(machine, module, name)


def _stack_global(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise CheckpointError("a name that is not text")
    _push_global(machine, module, name)


def _push_global(machine: Machine, module: str, name: str) -> None:
    check_global(module, name)
    machine.push(Global(f"{module}.{name}"), costs.NAME_BYTES)


def _persistent_id(machine: Machine) -> None:
    machine.push(storage_of(machine.stack.pop()), costs.OBJECT_BYTES)


def _reduce(machine: Machine) -> None:
    arguments, callee = machine.stack.pop(), machine.stack.pop()
    machine.push(reduce(callee, arguments), costs.OBJECT_BYTES)


def _build(machine: Machine) -> None:
    state = machine.stack.pop()
    set_state(machine.stack[-1], state)


def _pop(machine: Machine) -> None:
    machine.stack.pop()


def _pop_mark(machine: Machine) -> None:
    machine.pop_mark()


_STOP = ord(".")
_HANDLERS: dict[int, Handler] = {
    ord(code): handler
    for code, handler in {
        "\x80": _protocol,
        "\x95": Machine.begin_frame,
        "(": Machine.mark,
        "1": _pop_mark,
        "0": _pop,
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        ")": _constant(()),
        "K": _int8,
        "M": _int16,
        "J": _int32,
        "\x8a": _long(1),
        "\x8b": _long(4),
        "G": _float,
        "\x8c": _text(1),
        "X": _text(4),
        "\x8d": _text(8),
        "C": _bytes(1),
        "B": _bytes(4),
        "\x8e": _bytes(8),
        "\x96": _bytes(8),
        "]": _empty_list,
        "a": _append,
        "e": _appends,
        "}": _empty_dict,
        "s": _set_item,
        "u": _set_items,
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "t": _tuple_from_mark,
        "\x8f": _empty_list,  # of a set only its items matter: whether a tensor is among them
        "\x90": _appends,
        "\x91": _tuple_from_mark,
        "q": lambda machine: machine.memoize(machine.byte()),
        "r": lambda machine: machine.memoize(machine.number(4)),
        "\x94": lambda machine: machine.memoize(),
        "h": lambda machine: machine.recall(machine.byte()),
        "j": lambda machine: machine.recall(machine.number(4)),
        "c": _global,
        "\x93": _stack_global,
        "Q": _persistent_id,
        "R": _reduce,
        "b": _build,
    }.items()
}
