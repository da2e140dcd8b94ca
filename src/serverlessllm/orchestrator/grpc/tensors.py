"""The tensors of the Open Inference Protocol: read with every size checked, and written.

A tensor's values come in `contents`, typed, or raw: little-endian numbers one after the other, and
each element of `BYTES` behind its length (4 bytes). Triton's `tensor data` and KServe's
`raw_input_contents` are the same.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence

import msgspec

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.orchestrator.grpc.proto.open_inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
)

Value = bytes | bool | int | float

_INPUTS_MAX = 64
_NDIM_MAX = 8
_ELEMENTS_MAX = 4096
"""Of one tensor: no input of a language model has more."""
_LENGTH = struct.Struct("<I")

_FORMATS = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input: as many `values` as its shape says."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: tuple[Value, ...]


def read_inputs(request: ModelInferRequest) -> dict[str, Tensor]:
    """The inputs of a request by name.

    Raises:
        InvalidRequest: names, types, shapes and values do not fit together; says which.
    """
    inputs, raws = request.inputs, request.raw_input_contents
    if len(inputs) > _INPUTS_MAX:
        raise InvalidRequest(f"inputs: at most {_INPUTS_MAX}", param="inputs")
    if raws and len(raws) != len(inputs):
        raise InvalidRequest(
            f"raw_input_contents: {len(raws)} for {len(inputs)} inputs", param="raw_input_contents"
        )
    tensors: dict[str, Tensor] = {}
    for number, tensor in enumerate(inputs):
        if tensor.name in tensors:
            raise _wrong(tensor.name, "is there twice")
        tensors[tensor.name] = _read(tensor, raws[number] if raws else None)
    return tensors


def _read(tensor: ModelInferRequest.InferInputTensor, raw: bytes | None) -> Tensor:
    name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
    if any(key.startswith("shared_memory") for key in tensor.parameters):
        raise _wrong(name, "is in shared memory, which this server does not take")
    if len(shape) > _NDIM_MAX or any(not 0 <= size <= _ELEMENTS_MAX for size in shape):
        raise _wrong(name, f"has a shape of more than {_NDIM_MAX} x {_ELEMENTS_MAX}, or below 0")
    count = math.prod(shape)
    if count > _ELEMENTS_MAX:
        raise _wrong(name, f"has more than {_ELEMENTS_MAX} elements")
    if datatype != "BYTES" and datatype not in _FORMATS:
        raise _wrong(name, f"has a datatype that is not known: {datatype[:40]!r}")
    given = tensor.HasField("contents")
    if raw is not None and given:
        raise _wrong(name, "has contents, and raw_input_contents too")
    values = _contents(tensor) if raw is None else _raw(name, datatype, raw, count)
    if len(values) != count:
        raise _wrong(name, f"has {len(values)} elements, and its shape {list(shape)} says {count}")
    return Tensor(name=name, datatype=datatype, shape=shape, values=values)


def _contents(tensor: ModelInferRequest.InferInputTensor) -> tuple[Value, ...]:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise _wrong(tensor.name, f"of {tensor.datatype} comes in raw_input_contents only")
    for other, values in tensor.contents.ListFields():
        if other.name != field:
            raise _wrong(tensor.name, f"of {tensor.datatype} comes in {field}, not {other.name}")
        if len(values) > _ELEMENTS_MAX:
            raise _wrong(tensor.name, f"has more than {_ELEMENTS_MAX} elements")
    return tuple(getattr(tensor.contents, field))


def _raw(name: str, datatype: str, data: bytes, count: int) -> tuple[Value, ...]:
    if datatype == "BYTES":
        return _strings(name, data)
    form = struct.Struct(f"<{count}{_FORMATS[datatype]}")
    if len(data) != form.size:
        raise _wrong(name, f"has {len(data)} bytes, and {count} x {datatype} are {form.size}")
    return form.unpack(data)


def _strings(name: str, data: bytes) -> tuple[bytes, ...]:
    values: list[bytes] = []
    at = 0
    while at < len(data):
        start = at + _LENGTH.size
        end = start + _LENGTH.unpack_from(data, at)[0] if start <= len(data) else len(data) + 1
        if end > len(data):
            raise _wrong(name, "of BYTES ends inside an element: each is behind its length")
        if len(values) >= _ELEMENTS_MAX:
            raise _wrong(name, f"has more than {_ELEMENTS_MAX} elements")
        values.append(data[start:end])
        at = end
    return tuple(values)


def _wrong(name: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"the input {name[:100]!r} {what}", param="inputs")


def add_strings(response: ModelInferResponse, name: str, values: Sequence[bytes]) -> None:
    """An output of `BYTES`."""
    response.outputs.add(name=name, datatype="BYTES", shape=[len(values)])
    response.raw_output_contents.append(
        b"".join(part for value in values for part in (_LENGTH.pack(len(value)), value))
    )


def add_floats(response: ModelInferResponse, name: str, rows: Sequence[bytes]) -> None:
    """An output of `FP32`: rows of the same length, as `floats` gives them."""
    width = len(rows[0]) // 4 if rows else 0
    response.outputs.add(name=name, datatype="FP32", shape=[len(rows), width])
    response.raw_output_contents.append(b"".join(rows))


def floats(values: Iterable[float]) -> bytes:
    """Numbers as raw `FP32`."""
    packed = array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
