"""The names that a pickle of tensors may refer to, and the description that each one makes.

A name is looked up in a table and nowhere else. The functions mirror the signatures of
`torch/_utils.py`; none of them touches a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from serverlessllm.checkpoint.dtypes import DIMS_MAX, SAFETENSORS_BITS
from serverlessllm.checkpoint.pickles.values import (
    NUMBER_MAX,
    STORAGE_KEY_CHARS_MAX,
    Global,
    Opaque,
    Storage,
    Tensor,
    Value,
)
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint

Arguments = tuple[Value, ...]

TORCH_DTYPES: Final = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.complex64": "C64",
}
STORAGES: Final = {
    "torch.BoolStorage": "BOOL",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": None,
}
_BUILTINS = ("builtins", "__builtin__")
_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})

_QUANTIZED = "a quantized tensor, whose scales lie outside of its bytes: save it dequantized"
_SPARSE = "a sparse or nested tensor: save it dense, with `.to_dense()`"
_COMPLEX = "a complex type that safetensors has no name for: save it as complex64"
_SUBCLASS = "a tensor of a class of its own: save its plain tensors"
_REASONS = {
    "torch._utils._rebuild_qtensor": _QUANTIZED,
    "torch.QInt8Storage": _QUANTIZED,
    "torch.QUInt8Storage": _QUANTIZED,
    "torch.QInt32Storage": _QUANTIZED,
    "torch.QUInt4x2Storage": _QUANTIZED,
    "torch.QUInt2x4Storage": _QUANTIZED,
    "torch._utils._rebuild_sparse_tensor": _SPARSE,
    "torch._utils._rebuild_sparse_csr_tensor": _SPARSE,
    "torch._utils._rebuild_nested_tensor": _SPARSE,
    "torch.ComplexDoubleStorage": _COMPLEX,
    "torch.complex128": _COMPLEX,
    "torch.complex32": _COMPLEX,
    "torch._utils._rebuild_wrapper_subclass": _SUBCLASS,
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor of the meta device: it has no bytes",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device: save it from "
    "the CPU",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device: save it "
    "from the CPU",
    "torch.float4_e2m1fn_x2": "an element type of half a byte: save it with `.view(torch.uint8)`",
}
_REASONS_BY_PACKAGE = {
    "numpy": "a NumPy value: make it a plain number, with `.item()`, or a tensor, or leave it out",
    "torch.distributed": "a part of a tensor that is spread over processes: save `.full_tensor()`",
    "torchao": _QUANTIZED,
    "torch.nn": "a whole model, which is a program with weights: save `model.state_dict()` in its "
    "place",
    "transformers": "an object of transformers: save `model.state_dict()` alone, or the model with "
    "`model.save_pretrained`",
}
_REASON = (
    "an object of a program, which is neither run nor read: save the `state_dict` alone, without it"
)


def check_global(module: str, name: str) -> None:
    """Refuse a name that is not in a table of this module.

    Raises:
        UnsupportedCheckpoint: says which, and why where that is known.
    """
    full = f"{module}.{name}"
    if (module, name) in _KNOWN:
        return
    package = next((p for p in _REASONS_BY_PACKAGE if full.startswith(f"{p}.")), "")
    reason = _REASONS.get(full) or _REASONS_BY_PACKAGE.get(package, _REASON)
    raise UnsupportedCheckpoint(f"refers to {ascii(full)[:200]}, {reason}")


def storage_of(persistent_id: Value) -> Storage:
    """`("storage", type, key, location, elements)`, what `torch.save` writes for a storage.

    Raises:
        CheckpointError: anything else.
    """
    if type(persistent_id) is not tuple or len(persistent_id) != 5:
        raise CheckpointError("a persistent id that is no storage")
    kind, type_, key, location, elements = persistent_id
    if (
        kind != "storage"
        or type(type_) is not Global
        or type_.name not in STORAGES
        or type(key) is not str
        or type(location) is not str
    ):
        raise CheckpointError("a persistent id that is no storage")
    if len(key) > STORAGE_KEY_CHARS_MAX:  # it will be in the answer, once for each of its tensors
        raise CheckpointError(f"a storage by a name of {len(key)} characters")
    dtype = STORAGES[type_.name]
    size = _natural(elements, "size of a storage") * _item_bytes(dtype)
    return Storage(key, dtype, _natural(size, "size of a storage"))


def _item_bytes(dtype: str | None) -> int:
    return SAFETENSORS_BITS[dtype] // 8 if dtype else 1


def reduce(callee: Value, arguments: Value) -> Value:
    """What a call would make, as a description.

    Raises:
        CheckpointError: something else is called, or the arguments are not what it takes.
    """
    if type(callee) is not Global or callee.name not in _CALLS:
        raise UnsupportedCheckpoint("calls something that makes no tensor")
    if type(arguments) is not tuple:
        raise CheckpointError(f"calls {callee.name} with something that is not a tuple")
    return _CALLS[callee.name](arguments)


def set_state(target: Value, state: Value) -> None:
    """Let BUILD pass where it only notes things beside the tensors: `_metadata` of a dict.

    Raises:
        UnsupportedCheckpoint: it would do more.
    """
    if type(target) is not dict or type(state) is not dict:
        raise UnsupportedCheckpoint("opcode BUILD sets the state of something that is not a dict")


def _tensor_v1(arguments: Arguments) -> Tensor:
    """`_rebuild_tensor(storage, storage_offset, size, stride)`."""
    _count(arguments, 4, 4)
    return _view(arguments, None)


def _tensor_v2(arguments: Arguments) -> Tensor:
    """`_rebuild_tensor_v2(…, requires_grad, backward_hooks, metadata=None)`."""
    _count(arguments, 6, 7)
    _check_metadata(arguments[6:])
    return _view(arguments, None)


def _tensor_v3(arguments: Arguments) -> Tensor:
    """`_rebuild_tensor_v3(…, requires_grad, backward_hooks, dtype, metadata=None)`."""
    _count(arguments, 7, 8)
    _check_metadata(arguments[7:])
    return _view(arguments, arguments[6])


def _parameter(arguments: Arguments) -> Tensor:
    """`_rebuild_parameter(data, requires_grad, backward_hooks)`, `…_with_state(…, state)`."""
    _count(arguments, 3, 4)
    data = arguments[0]
    if type(data) is not Tensor:
        raise CheckpointError("a parameter that is not made of a tensor")
    return data


def _from_type(arguments: Arguments) -> Value:
    """`_rebuild_from_type_v2(func, type, args, state)`: a tensor with attributes."""
    _count(arguments, 4, 4)
    function, type_, inner, _ = arguments
    if type(function) is not Global or function.name not in _REBUILDS:
        raise UnsupportedCheckpoint("a tensor that is made in another way than torch's")
    if type(type_) is not Global or type_.name not in _TYPES or type(inner) is not tuple:
        raise UnsupportedCheckpoint("a tensor of a class of its own: save its plain tensors")
    return _REBUILDS[function.name](inner)


def _ordered_dict(arguments: Arguments) -> dict[Value, Value]:
    _count(arguments, 0, 0)
    return {}


def _size(arguments: Arguments) -> tuple[Value, ...]:
    """`torch.Size((2, 3))`."""
    _count(arguments, 1, 1)
    return _numbers(arguments[0], "size")


def _opaque(arguments: Arguments) -> Opaque:
    _count(arguments, 1, 2)
    return Opaque()


def _plain(arguments: Arguments) -> Arguments:
    """A set, a counter, bytes: nothing for us, but for what they are made of."""
    _count(arguments, 0, 2)
    return arguments


_REBUILDS: dict[str, Callable[[Arguments], Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor_v1,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_CALLS: dict[str, Callable[[Arguments], Value]] = {
    **_REBUILDS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch.device": _opaque,
    "torch.serialization._get_layout": _opaque,
    "collections.Counter": _plain,
    **{
        f"{module}.{name}": _plain
        for module in _BUILTINS
        for name in ("set", "frozenset", "bytearray")
    },
    **{f"{module}.complex": _opaque for module in _BUILTINS},
    "_codecs.encode": _opaque,
}
"""What else `torch.load(weights_only=True)` takes is here too, the bytes of protocol 2 among it."""
_KNOWN: Final = frozenset(
    (module, name)
    for module, _, name in (
        full.rpartition(".") for full in (*_CALLS, *STORAGES, *TORCH_DTYPES, *_TYPES)
    )
)
"""Module and name apart, so that a dotted name is not one of them."""


def _view(arguments: Arguments, dtype: Value) -> Tensor:
    storage, offset, shape, strides = arguments[:4]
    if type(storage) is not Storage:
        raise CheckpointError("a tensor that is not made of a storage")
    if dtype is None:
        name = storage.dtype
    else:
        name = TORCH_DTYPES.get(dtype.name) if type(dtype) is Global else None
    if name is None:
        raise CheckpointError("a tensor without an element type")
    return Tensor(
        storage,
        name,
        _natural(offset, "offset"),
        _numbers(shape, "size"),
        _numbers(strides, "stride"),
    )


def _check_metadata(metadata: Arguments) -> None:
    """Bits that change what the bytes mean: conjugated, negated."""
    for item in metadata:
        if item is not None and item != {}:
            raise UnsupportedCheckpoint(
                "a tensor that is conjugated or negated when it is read: save it with "
                "`.resolve_conj().resolve_neg()`"
            )


def _count(arguments: Arguments, least: int, most: int) -> None:
    if not least <= len(arguments) <= most:
        raise CheckpointError(f"a call with {len(arguments)} arguments")


def _numbers(value: Value, what: str) -> tuple[int, ...]:
    """The tuple itself, not a copy: it may be used a hundred thousand times."""
    if type(value) is not tuple:
        raise CheckpointError(f"a {what} that is not a tuple of numbers")
    numbers: tuple[Any, ...] = value
    if len(numbers) > DIMS_MAX:
        raise CheckpointError(f"a {what} of {len(numbers)} dimensions, more than {DIMS_MAX}")
    for number in numbers:
        _natural(number, what)
    return numbers


def _natural(value: Value, what: str) -> int:
    if type(value) is not int:
        raise CheckpointError(f"a {what} that is not a number")
    if not 0 <= value <= NUMBER_MAX:
        raise CheckpointError(f"a {what} of {value}")
    return value
