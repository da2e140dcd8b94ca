"""Pickles that pose as state dicts: some would run code if anything ran them, some are bombs."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from serverlessllm.checkpoint.pickles.opcodes import OPCODE_NAMES
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.testing.torch_files import (
    HOOKS,
    REBUILD,
    number,
    numbers,
    pickle_of,
    state_dict,
    storage,
    tensor,
    text,
    tuple_of,
)

CANARY = "sllm-canary"
"""The file that a payload makes in the working directory, if it is run."""


class HostilePickle(NamedTuple):
    """A pickle that must be refused by an `error`."""

    name: str
    data: bytes
    error: type[CheckpointError]


_COMMAND = f"touch {CANARY}"
_CALLS = {
    "os system": text(_COMMAND),
    "posix system": text(_COMMAND),
    "os popen": text(_COMMAND),
    "os putenv": text("A") + text("B"),
    "os remove": text(CANARY),
    "os execv": text("/bin/sh"),
    "os _exit": number(0),
    "subprocess check_output": text(_COMMAND),
    "subprocess Popen": text(_COMMAND),
    "pty spawn": text(_COMMAND),
    "builtins eval": text(f"open('{CANARY}','w')"),
    "builtins exec": text(f"open('{CANARY}','w')"),
    "__builtin__ eval": text(f"open('{CANARY}','w')"),
    "builtins compile": text("1"),
    "builtins __import__": text("this"),
    "builtins getattr": text("a") + text("__class__"),
    "builtins open": text(CANARY) + text("w"),
    "builtins set": b"]",
    "builtins breakpoint": b"",
    "importlib import_module": text("this"),
    "runpy run_path": text(CANARY),
    "pickle loads": b"C\x02N.",
    "_pickle loads": b"C\x02N.",
    "marshal loads": b"C\x01N",
    "types FunctionType": b"",
    "ctypes CDLL": text("libc.so.6"),
    "socket create_connection": numbers([1, 2]),
    "urllib.request urlopen": text("http://127.0.0.1:9/"),
    "shutil rmtree": text("/nowhere"),
    "webbrowser open": text("http://127.0.0.1:9/"),
    "operator attrgetter": text("system"),
    "functools partial": text("x"),
    "_codecs encode": text("x") + text("latin1"),
    "copyreg _reconstructor": b"NNN",
    "torch load": text(CANARY),
    "torch.hub load": text("a") + text("b"),
    "torch.jit._serialization load": text(CANARY),
    "torch._utils _import_dotted_name": text("os.system"),
    "torch.storage _load_from_bytes": b"C\x02N.",
    "torch.nn.modules.linear Linear": numbers([2, 2]),
    "numpy.core.multiarray scalar": b"",
    "numpy.core.multiarray _reconstruct": b"",
    "argparse Namespace": b"",
    "torch._utils _rebuild_qtensor": b"",
    "torch._utils _rebuild_sparse_tensor": b"",
    "torch._utils _rebuild_wrapper_subclass": b"",
    "torch._utils _rebuild_meta_tensor_no_storage": b"",
    "torch QInt8Storage": b"",
    "torch ComplexDoubleStorage": b"",
}
_NAMES = {
    "a dotted name": ("torch", "_utils._rebuild_tensor_v2"),
    "a dotted way to os": ("torch", "serialization.os.system"),
    "an attribute of a known name": ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "a method of a known name": ("collections", "OrderedDict.fromkeys"),
    "cyrillic letters": ("\u043es", "system"),
    "a cyrillic torch": ("t\u043erch._utils", "_rebuild_tensor_v2"),
    "full-width letters": ("\uff4f\uff53", "system"),
    "a zero-width space": ("torch\u200b", "FloatStorage"),
    "a NUL": ("torch._utils\0", "_rebuild_tensor_v2"),
    "another case": ("Torch", "FloatStorage"),
    "a space": ("torch ", "FloatStorage"),
    "no module": ("", "eval"),
    "no name": ("torch", ""),
    "a module alone": ("torch", "torch"),
    "a dunder": ("torch", "__dict__"),
}


def hostile_pickles() -> Iterator[HostilePickle]:
    """More than 150 pickles, each with the error that refuses it."""
    for table, error in ((_refused(), UnsupportedCheckpoint), (_invalid(), CheckpointError)):
        for name, data in table.items():
            yield HostilePickle(name, data, error)


def _refused() -> dict[str, bytes]:
    """What is valid, perhaps, but no state dict."""
    found: dict[str, bytes] = {}
    for full, arguments in _CALLS.items():
        module, name = full.split(" ")
        line = f"c{module}\n{name}\n".encode()
        found[f"REDUCE {full}"] = pickle_of(line + tuple_of([arguments]) + b"R")
    payload = tuple_of([text(_COMMAND)])
    on_stack = text("os") + text("system") + b"\x93"
    found |= {
        "STACK_GLOBAL os.system": pickle_of(on_stack + payload + b"R"),
        "INST os.system": pickle_of(b"(" + text(_COMMAND) + b"ios\nsystem\n"),
        "OBJ os.system": pickle_of(b"(" + on_stack + text(_COMMAND) + b"o"),
        "NEWOBJ os.system": pickle_of(on_stack + payload + b"\x81"),
        "NEWOBJ_EX os.system": pickle_of(on_stack + payload + b"}\x92"),
        "REDUCE with a memoized callee": pickle_of(on_stack + b"\x940h\x00" + payload + b"R"),
        "a tensor, then os.system": pickle_of(tensor() + b"0" + on_stack + payload + b"R"),
        "os.system as a value": state_dict({"a": tensor(), "b": on_stack + payload + b"R"}),
        "os.system as hooks": pickle_of(REBUILD + tuple_of([storage(), on_stack])),
        "os.system as a storage": pickle_of(storage(type_=b"cos\nsystem\n")),
        "NEWOBJ of a dict": pickle_of(b"ccollections\nOrderedDict\n)\x81"),
        "REDUCE of a tensor": pickle_of(tensor() + b")R"),
        "REDUCE of a text": pickle_of(text("os.system") + payload + b"R"),
        "REDUCE of a storage's type": pickle_of(b"ctorch\nFloatStorage\n)R"),
        "BUILD of a name": pickle_of(b"ctorch\nTensor\n}" + text("__setstate__") + b"Nsb"),
        "BUILD of a tensor": pickle_of(tensor() + b"}" + text("__class__") + b"Nsb"),
        "BUILD of a list": pickle_of(b"]}b"),
        "BUILD with a slot state": pickle_of(b"}" + b"N}\x86b"),
        "BUILD with __setstate__": pickle_of(b"}" + text("__setstate__") + on_stack + b"sb"),
        "BUILD of a class attribute": pickle_of(b"ccollections\nOrderedDict\n}b"),
        "a type that makes its own tensors": pickle_of(
            b"ctorch._tensor\n_rebuild_from_type_v2\n"
            + tuple_of([b"ccollections\nOrderedDict\n", b"ctorch\nTensor\n", b")", b"N"])
            + b"R"
        ),
        "a type that is no tensor's": pickle_of(
            b"ctorch._tensor\n_rebuild_from_type_v2\n"
            + tuple_of([REBUILD, b"ctorch\nSize\n", b")", b"N"])
            + b"R"
        ),
        "a tuple as a key": pickle_of(b"}(NtNs"),
        "a deep tuple as a key": pickle_of(b"}N" + b"\x85" * 100_000 + b"Ns"),
        "a conjugated tensor": pickle_of(tensor(more=b"}" + text("conj") + b"\x88s")),
        "a tensor and no dict": pickle_of(tensor()),
        "a list of tensors": pickle_of(b"]" + tensor() + b"a"),
        "no tensor": pickle_of(b"}"),
        "tensors in a container": state_dict({"a": tensor(), "b": b"]" + tensor() + b"a"}),
        "a dict that contains itself": pickle_of(b"}\x94" + text("model") + b"h\x00s"),
        "a list that contains itself": pickle_of(b"]\x94h\x00a"),
        "billion laughs": pickle_of(
            b")\x940" + b"".join(b"(" + b"h%c" % n * 100 + b"t\x940" for n in range(200)) + b"hd"
        ),
        "wrappers without end": pickle_of(
            b"".join(b"}" + text("model") for _ in range(50)) + tensor() + b"s" * 50
        ),
        "protocol 6": b"\x80\x06N.",
        "protocol 0": b"\x80\x00N.",
        "two protocols": b"\x80\x02\x80\xffN.",
    }
    for what, (module, name) in _NAMES.items():
        found[f"a name with {what}"] = pickle_of(text(module) + text(name) + b"\x93)R")
        found[f"GLOBAL with {what}"] = pickle_of(f"c{module}\n{name}\n)R".encode())
    for code, opcode in OPCODE_NAMES.items():
        found[f"opcode {opcode}"] = pickle_of(b"N" + bytes([code]) + b"\x01\0\0\0\n\n")
    found["no opcode"] = pickle_of(b"\xff")
    return found


def _invalid() -> dict[str, bytes]:
    """What no pickler writes."""
    found = {
        "nothing": b"",
        "no protocol": b"N.",
        "text": b"hello",
        "no end": b"\x80\x02N",
        "an empty stack at its end": b"\x80\x02.",
        "two things at its end": pickle_of(b"NN"),
        "a mark at its end": pickle_of(b"(N"),
        "bytes after its end": pickle_of(b"N") + b"N",
        "a pop of nothing": pickle_of(b"0"),
        "a tuple of nothing": pickle_of(b"\x87"),
        "a tuple without a mark": pickle_of(b"t"),
        "a tuple across a mark": pickle_of(b"NN(N\x87"),
        "REDUCE of nothing": pickle_of(b"R"),
        "REDUCE without a tuple": pickle_of(b"ccollections\nOrderedDict\nNR"),
        "BUILD of nothing": pickle_of(b"b"),
        "items for no dict": pickle_of(b"(NNu"),
        "items for a list": pickle_of(b"](NNu"),
        "half an item": pickle_of(b"}(NNNu"),
        "an append to a dict": pickle_of(b"}Na"),
        "an append to a tuple": pickle_of(b")Na"),
        "GLOBAL without an end": b"\x80\x02cos",
        "a name that is not UTF-8": pickle_of(b"c\xff\nx\n"),
        "a name that is no text": pickle_of(b"NN\x93"),
        "a name of a megabyte": pickle_of(b"c" + b"a" * 1_000_000 + b"\nb\n"),
        "a text that is not UTF-8": pickle_of(b"X\x01\0\0\0\xff"),
        "a text of 4 GiB": pickle_of(b"X\xff\xff\xff\xff"),
        "a text of 16 EiB": pickle_of(b"\x8d" + b"\xff" * 8),
        "bytes of 16 EiB": pickle_of(b"\x8e" + b"\xff" * 8),
        "a number of 2 GiB": pickle_of(b"\x8b\xff\xff\xff\x7f"),
        "a number of 255 bytes": pickle_of(b"\x8a\xff" + b"\x7f" * 255),
        "a frame of 16 EiB": pickle_of(b"\x95" + b"\xff" * 8 + b"N"),
        "a frame in a frame": pickle_of(
            b"\x95" + struct.pack("<Q", 10) + b"\x95" + bytes(8) + b"N"
        ),
        "a huge number of a memo": pickle_of(b"Nr\xff\xff\xff\xff"),
        "a memo entry that is not there": pickle_of(b"h\x05"),
        "a memo entry out of range": pickle_of(b"j\xff\xff\xff\xff"),
        "a memo of nothing": pickle_of(b"\x94"),
        "a memo of nothing after a mark": pickle_of(b"N(\x94"),
        "too long": b"\x80\x02" + bytes(17 << 20),
        "a key that is no text": pickle_of(b"}K\x01" + tensor() + b"s"),
        "a key of 1 MiB": pickle_of(b"}" + text("a" * (1 << 20)) + b"Ns"),
        "a name of 6 MiB in the answer": state_dict({"\x01" * (1 << 20): tensor()}),
        "a name that acts on a terminal": state_dict({"\x1b[2J": tensor()}),
        "a name of 513 bytes": state_dict({"\u00e9" * 256 + "a": tensor()}),
    }
    for what, data in _bombs().items():
        found[f"a bomb of {what}"] = data
    for what, persistent in _lying_storages().items():
        found[f"a storage with {what}"] = state_dict({"a": tensor(persistent)})
    for what, made in _lying_tensors().items():
        found[f"a tensor with {what}"] = state_dict({"a": made})
    return found


def _bombs() -> dict[str, bytes]:
    """What would take memory or time without end, if nobody counted."""
    long = text("a" * (1 << 20))
    return {
        "lists": b"\x80\x02" + b"]" * 2_400_000,
        "dicts": b"\x80\x02" + b"}" * 2_400_000,
        "tuples": b"\x80\x02N" + b"\x85" * 2_400_000,
        "marks": b"\x80\x02" + b"(" * 2_400_000,
        "memo entries": b"\x80\x02N" + b"\x94" * 2_400_000,
        "memo reads": b"\x80\x02N\x94" + b"h\0" * 2_400_000,
        "numbers": b"\x80\x02" + b"J\xff\xff\xff\x7f" * 2_000_000,
        "names": b"\x80\x02" + b"ctorch\nSize\n" * 500_000,
        "texts": b"\x80\x02" + (b"X\xff\xff\0\0" + b"a" * 0xFFFF) * 20,
        "wide texts": b"\x80\x02" + text("\U0001f600" + "a" * 99_000) * 120,
        "nothing": b"\x80\x02" + b"N0" * 2_000_000,
        "numbers of one hash": _numbered(
            [index * _HASH_PRIME for index in range(-900, 900)], 899 * _HASH_PRIME
        ),
        "numbers on one path": _numbered(*_path(1 << 16)),
        "equal keys that are long": pickle_of(
            b"}\x94" + long + b"Ns" + long + b"\x940(" + b"h\x01N" * 380_000 + b"u"
        ),
        "sizes": pickle_of(
            b"ctorch\nSize\n\x940" + numbers([1] * 64) + b"\x85\x940" + b"h\0h\x01R" * 350_000
        ),
        "tensors of many dimensions": pickle_of(
            REBUILD
            + b"\x940"
            + tuple_of([storage(), number(0), *[numbers([1] * 64)] * 2, b"\x89", HOOKS])
            + b"\x940"
            + b"h\0h\x01R" * 350_000
        ),
        "tensors of a storage with a long name": pickle_of(
            tensor(storage(key=text("0" * (1 << 20))))
            + b"\x940}("
            + b"".join(text(str(n)) + b"h\0" for n in range(100_000))
            + b"u"
        ),
        "200,001 tensors": pickle_of(
            tensor() + b"\x940}(" + b"".join(text(str(n)) + b"h\0" for n in range(200_001)) + b"u"
        ),
    }


_HASH_PRIME = (1 << 61) - 1
"""Numbers that differ by it have one hash, on a machine of 64 bits."""


def _numbered(keys: Sequence[int], last: int) -> bytes:
    """A dict of these keys, and then 300,000 times the last one."""
    items = b"".join(number(key) + b"N" for key in keys)
    return pickle_of(number(last) + b"\x940}(" + items + b"u(" + b"h\0N" * 300_000 + b"u")


def _path(slots: int) -> tuple[list[int], int]:
    """Keys that fill a dict of so many slots along one path of its probing, and one to walk it.

    By `lookdict` of CPython's `Objects/dictobject.c`.
    """
    path = [0]
    while len(path) < slots * 5 // 8:
        path.append((5 * path[-1] + 1) % slots)
    place = {slot: position for position, slot in enumerate(path)}
    for walker in range(slots, slots * 1000):
        slot, rest = walker % slots, walker
        while slot in place and rest:
            rest >>= 5
            slot = (5 * slot + rest + 1) % slots
        if place.get(slot, slots) < 100:
            return [*path, walker], walker
    raise AssertionError


def _lying_storages() -> dict[str, bytes]:
    """Persistent ids that are not of a storage."""
    return {
        "no tuple": text("storage") + b"Q",
        "an empty tuple": b")Q",
        "another kind": tuple_of([text("module"), b"NNNN"]) + b"Q",
        "six parts": tuple_of([text("storage"), b"NNNNN"]) + b"Q",
        "a type that is text": storage(text("FloatStorage")),
        "a type that is a function": storage(REBUILD),
        "a type that is None": storage(b"N"),
        "a key that is a number": storage(key=number(0)),
        "a negative size": storage(elements=number(-1)),
        "a size of 2^63": storage(elements=number(1 << 63)),
        "a size that overflows": storage(elements=number((1 << 62) + 1)),
        "a size that is a float": storage(elements=number(4.0)),
        "a size that is a bool": storage(elements=number(True)),
        "a size that is None": storage(elements=number(None)),
    }


def _lying_tensors() -> dict[str, bytes]:
    """Calls of `_rebuild_tensor_v2` that no tensor writes."""
    return {
        "no storage": tensor(number(None)),
        "a dict as its storage": tensor(b"}"),
        "a tensor as its storage": tensor(tensor()),
        "a negative offset": tensor(offset=number(-1)),
        "an offset of 2^63": tensor(offset=number(1 << 63)),
        "an offset that is a float": tensor(offset=number(0.0)),
        "a negative size": tensor(shape=numbers([-4])),
        "a size of 2^63": tensor(shape=numbers([1 << 63])),
        "a size that is NaN": tensor(shape=numbers([float("nan")])),
        "a size that is a bool": tensor(shape=numbers([True])),
        "a size that is a list": tensor(shape=b"]K\x04a"),
        "a size that is a number": tensor(shape=number(4)),
        "a million dimensions": tensor(shape=numbers([1] * 100_000)),
        "a negative stride": tensor(strides=numbers([-1])),
        "a stride of 2^63": tensor(strides=numbers([1 << 63])),
        "a stride that is NaN": tensor(strides=numbers([float("nan")])),
        "a stride that is infinite": tensor(strides=numbers([float("inf")])),
        "a stride that is None": tensor(strides=numbers([None])),
        "too few arguments": REBUILD + tuple_of([storage()]) + b"R",
        "too many arguments": tensor(more=b"NNNN"),
    }
