"""The closed set of element types, and how many bytes a shape of them takes."""

from __future__ import annotations

import math

from serverlessllm.core.errors import CheckpointError

DIMS_MAX = 8
ELEMENTS_MAX = 1 << 53

SAFETENSORS_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits an element, by safetensors' name."""

GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""By the number in a GGUF's tensor table: name, elements a block, bytes a block."""

_GGML_BLOCKS = {name: (elements, size) for name, elements, size in GGML_TYPES.values()}


def tensor_size_bytes(kind: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a row-major tensor of an index of `kind` (`tensors` or `gguf`).

    Raises:
        CheckpointError: a dtype outside of the kind's set, too many or negative dimensions, more
            elements than 2⁵³, or elements that do not fill whole bytes (blocks, for GGML).
    """
    if len(shape) > DIMS_MAX:
        raise CheckpointError(f"{len(shape)} dimensions, more than {DIMS_MAX}")
    if any(not 0 <= dim <= ELEMENTS_MAX for dim in shape):
        raise CheckpointError("a dimension is negative or too large")
    elements = math.prod(shape)
    if elements > ELEMENTS_MAX:
        raise CheckpointError("the product of the dimensions is too large")
    if kind == "gguf":
        return _ggml_size(dtype, shape, elements)
    bits = SAFETENSORS_BITS.get(dtype)
    if bits is None:
        raise CheckpointError(f"unknown dtype {dtype[:40]!r}")
    if elements * bits % 8:
        raise CheckpointError(f"{elements} elements of {dtype} do not fill whole bytes")
    return elements * bits // 8


def _ggml_size(dtype: str, shape: tuple[int, ...], elements: int) -> int:
    if dtype not in _GGML_BLOCKS:
        raise CheckpointError(f"unknown GGML type {dtype[:40]!r}")
    block_elements, block_bytes = _GGML_BLOCKS[dtype]
    row = shape[-1] if shape else 1
    if row % block_elements:
        raise CheckpointError(
            f"a row of {row} elements does not fill blocks of {block_elements} ({dtype})"
        )
    return elements // block_elements * block_bytes
