"""Element types against the libraries that define them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors

from serverlessllm.checkpoint.dtypes import GGML_TYPES, SAFETENSORS_BITS, tensor_size_bytes
from serverlessllm.core.errors import CheckpointError
from serverlessllm.testing.checkpoints import RawTensorData, safetensors_bytes

deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def test_ggml_types_are_those_of_llama_cpp() -> None:
    theirs = {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType
    }
    assert theirs == GGML_TYPES


@pytest.mark.parametrize("dtype", SAFETENSORS_BITS)
def test_the_safetensors_library_agrees_on_every_size(dtype: str) -> None:
    size = tensor_size_bytes("tensors", dtype, (3, 8))
    data = np.arange(size, dtype=np.uint8).tobytes()
    [(name, read)] = deserialize(safetensors_bytes({"x": RawTensorData(dtype, (3, 8), data)}))
    assert (name, read["dtype"], read["shape"], bytes(read["data"])) == ("x", dtype, [3, 8], data)


@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    [
        ("tensors", "F4", (3,)),
        ("tensors", "F6_E2M3", (2,)),
        ("tensors", "f32", (1,)),
        ("tensors", "U8", (1 << 27, 1 << 27)),
        ("tensors", "U8", (-1, -1)),
        ("tensors", "U8", (1,) * 9),
        ("gguf", "Q4_K", (255,)),
        ("gguf", "Q4_K", (256, 1)),
        ("gguf", "Q4_K", ()),
        ("gguf", "U8", (1,)),
    ],
)
def test_refuses_what_has_no_size(kind: str, dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError):
        tensor_size_bytes(kind, dtype, shape)


def test_sizes() -> None:
    assert tensor_size_bytes("tensors", "BF16", ()) == 2
    assert tensor_size_bytes("tensors", "F4", (3, 2)) == 3
    assert tensor_size_bytes("tensors", "F6_E3M2", (4,)) == 3
    assert tensor_size_bytes("tensors", "F32", (0, 1 << 52)) == 0
    assert tensor_size_bytes("gguf", "Q4_1", (2, 64)) == 80
