"""What quantising makes of a tensor, and the folder that it is written to. No engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from serverlessllm.checkpoint import quantized
from serverlessllm.checkpoint.index import Chunk, Index, Quantization, Tensor
from serverlessllm.checkpoint.quantized import (
    Part,
    SafetensorsFolder,
    Scheme,
    has_kernel,
    private_bytes,
    scheme,
)
from serverlessllm.core.errors import CheckpointError, InvalidRequest, OutOfSpace

INT8 = Scheme(name="int8", group_size=None)
INT4 = Scheme(name="int4", group_size=32)


def weight(*shape: int, dtype: str = "BF16") -> Tensor:
    return Tensor(name="model.layers.0.w.weight", dtype=dtype, shape=shape, offset=0, size_bytes=0)


def test_the_default_groups():
    assert scheme("int8") == INT8
    assert scheme("int4") == INT4
    assert scheme("int8", 64).group_size == 64


@pytest.mark.parametrize("name", ["int3", "INT8", "fp8", ""])
def test_an_unknown_scheme_is_refused_with_those_there_are(name):
    with pytest.raises(InvalidRequest, match="one of int8, int4"):
        scheme(name)


@pytest.mark.parametrize("size", [-1, 0, 1, 24, 512])
def test_another_group_is_refused_with_those_there_are(size):
    with pytest.raises(InvalidRequest, match="one of 16, 32, 64, 128, 256"):
        scheme("int4", size)


def test_what_a_weight_becomes_at_8_bits():
    form = quantized.quantized(weight(48, 64), INT8)
    assert [(p.name, p.dtype, p.shape) for p in form.parts] == [
        ("model.layers.0.w.weight", "I8", (48, 64)),
        ("model.layers.0.w.weight_scale", "BF16", (48, 1)),
    ]


def test_what_a_weight_becomes_at_4_bits():
    form = quantized.quantized(weight(42, 64, dtype="F32"), INT4)
    assert [(p.name, p.dtype, p.shape) for p in form.parts] == [
        ("model.layers.0.w.weight_packed", "I32", (42, 8)),
        ("model.layers.0.w.weight_scale", "F32", (42, 2)),
        ("model.layers.0.w.weight_zero_point", "I32", (6, 2)),
        ("model.layers.0.w.weight_shape", "I64", (2,)),
    ]


def test_rows_that_do_not_divide_name_the_groups_that_would():
    with pytest.raises(CheckpointError, match=r"rows of 48 weights.*--group-size 16 would"):
        quantized.quantized(weight(8, 48), INT4)
    with pytest.raises(CheckpointError, match=r"rows of 40 weights.*no group size does; int8 can"):
        quantized.quantized(weight(8, 40), INT4)
    assert quantized.quantized(weight(8, 41), INT8).weight.shape == (8, 41)


@pytest.mark.parametrize(
    "tensor",
    [weight(8, 64, dtype="F8_E4M3"), weight(64), weight(2, 8, 64), weight(8, 64, dtype="I8")],
)
def test_what_is_no_matrix_of_floats_is_refused(tensor):
    with pytest.raises(CheckpointError, match="no matrix of BF16, F16 or F32"):
        quantized.quantized(tensor, INT8)


def test_the_folder_is_safetensors_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(quantized, "SHARD_BYTES", 100)
    parts = [Part(name=f"t{n}", dtype="I16", shape=(5, 4)) for n in range(5)]
    values = {
        part.name: np.arange(20, dtype=np.int16).reshape(5, 4) * n for n, part in enumerate(parts)
    }
    with SafetensorsFolder(tmp_path, parts, {"tied": "t0"}) as out:
        for name in reversed(values):
            data = memoryview(values[name].tobytes())
            out.write(name, 16, data[16:])  # in any order
            out.write(name, 0, data[:16])
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == values.keys()
    assert sorted(set(weight_map.values())) == [
        f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)
    ]
    for name, file in weight_map.items():
        with safe_open(tmp_path / file, framework="numpy") as shard:
            assert shard.metadata() == {"format": "pt", "tied": "t0"}
            np.testing.assert_array_equal(shard.get_tensor(name), values[name])


def test_a_full_disk_shows_before_the_first_byte(tmp_path):
    huge = Part(name="huge", dtype="F32", shape=(1 << 20, 1 << 20))
    with pytest.raises(OutOfSpace, match="beside the destination"):
        SafetensorsFolder(tmp_path, [huge], {})
    assert not list(tmp_path.iterdir())


def index_of(tensor: Tensor, how: Scheme) -> Index:
    parts = quantized.quantized(tensor, how).parts
    return Index(
        model="m",
        source="s",
        revision="r",
        kind="tensors",
        size_bytes=1,
        chunks=(Chunk(blake3="0" * 64, crc32c=0),),
        tensors=tuple(
            Tensor(name=p.name, dtype=p.dtype, shape=p.shape, offset=0, size_bytes=p.size_bytes)
            for p in parts
        ),
        quantization=Quantization(
            scheme=how.name, library="l 1", group_size=how.group_size, error=0.1
        ),
    )


@pytest.mark.parametrize(
    ("tensor", "how", "expected"),
    [
        (weight(32, 64), INT8, 0),
        (weight(32, 64), INT4, 32 * 64 // 2 + 2 * 2 * 2 * 32),
        (weight(32, 64, dtype="F32"), INT8, 32 * 64 * 4),
        (weight(32, 64, dtype="F16"), INT4, 32 * 64 * 2),
        (weight(32, 96), INT8, 32 * 96 * 2),
        (weight(24, 64), INT4, 24 * 64 * 2),
        (weight(32, 64), Scheme(name="int8", group_size=32), 32 * 64 * 2),
    ],
)
def test_what_an_instance_holds_of_its_own(tensor, how, expected):
    assert private_bytes(index_of(tensor, how)) == expected


def test_kernels_are_asked_only_for_what_they_divide():
    assert has_kernel(8, 7, 64, None)
    assert not has_kernel(8, 16, 40, None)
    assert not has_kernel(8, 16, 64, 32)
    assert has_kernel(4, 16, 64, 32)
    assert not has_kernel(4, 8, 64, 32)
    assert not has_kernel(4, 16, 64, 16)
