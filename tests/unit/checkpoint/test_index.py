"""The `.idx`: what is written is read back; what cannot be true is refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.checkpoint.bounds import INDEX_BYTES_MAX
from serverlessllm.checkpoint.dtypes import SAFETENSORS_BITS, tensor_size_bytes
from serverlessllm.checkpoint.index import (
    Chunk,
    Index,
    SideFile,
    Tensor,
    checkpoint_id,
    decode_index,
    encode_index,
    layers,
    tensor_at,
)
from serverlessllm.core.errors import CheckpointError

CHUNK_BYTES = 4096


def tensor(name: str, offset: int, dtype: str = "F32", shape: tuple[int, ...] = (16,)) -> Tensor:
    size = tensor_size_bytes("tensors", dtype, shape)
    return Tensor(name=name, dtype=dtype, shape=shape, offset=offset, size_bytes=size)


def index_of(tensors: tuple[Tensor, ...], **fields: Any) -> Index:
    end = max((t.offset + t.size_bytes for t in tensors), default=1)
    size = fields.pop("size_bytes", end)
    return Index(
        **{
            "model": "org/name",
            "source": "hf://org/name",
            "revision": "main",
            "kind": "tensors",
            "size_bytes": size,
            "chunk_bytes": CHUNK_BYTES,
            "chunks": (Chunk(blake3="ab" * 32, crc32c=7),) * -(-size // CHUNK_BYTES),
            "tensors": tensors,
        }
        | fields
    )


GOOD = index_of(
    (tensor("model.embed_tokens.weight", 0), tensor("model.norm.weight", 64)),
    size_bytes=5000,
    side_files=(SideFile(name="config.json", offset=128, size_bytes=10),),
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    license="apache-2.0",
)


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    names = draw(
        st.lists(st.text("abcé.0_", min_size=1, max_size=12), min_size=1, max_size=8, unique=True)
    )
    offset, tensors = 0, []
    for name in names:
        dtype = draw(st.sampled_from(sorted(SAFETENSORS_BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        made = tensor(name, offset, dtype, (*shape, 8))
        tensors.append(made)
        offset = -(-(offset + made.size_bytes) // 64) * 64 + 64 * draw(st.integers(0, 2))
    aliases = {f"tied {name}": name for name in draw(st.sets(st.sampled_from(names)))}
    return index_of(tuple(tensors), size_bytes=offset + 1, aliases=aliases)


@given(indexes())
def test_what_is_encoded_is_decoded(index: Index) -> None:
    data = encode_index(index)
    assert decode_index(data) == index
    assert encode_index(decode_index(data)) == data


def test_is_json_with_a_line_for_each_tensor_and_chunk() -> None:
    text = encode_index(GOOD).decode()
    later = {"base", "quantization"}  # absent unless they say something
    assert list(json.loads(text)) == [x for x in Index.__struct_fields__ if x not in later]
    assert text.count('\n{"name":') == 3
    assert text.count('\n{"blake3":') == 2
    assert text.endswith("\n")


def test_the_order_of_aliases_does_not_change_the_identity() -> None:
    names = ("model.embed_tokens.weight", "model.norm.weight")
    one = {"a": names[0], "b": names[1]}
    two = {"b": names[1], "a": names[0]}
    ids = {checkpoint_id(encode_index(index_of(GOOD.tensors, aliases=a))) for a in (one, two)}
    assert len(ids) == 1
    assert len(ids.pop()) == 64


def test_unknown_fields_of_a_later_writer_are_passed_over() -> None:
    parsed = json.loads(encode_index(GOOD)) | {"note": ["new"]}
    assert decode_index(json.dumps(parsed).encode()) == GOOD


def test_chunks_cover_the_bin() -> None:
    assert [GOOD.chunk_range(n) for n in range(2)] == [(0, 4096), (4096, 904)]


def test_a_newer_version_says_so() -> None:
    data = json.dumps({"format": "sllm-checkpoint", "version": 2, "shape": "unknown"}).encode()
    with pytest.raises(CheckpointError, match=r"version 2.*upgrade"):
        decode_index(data)


def _changed(path: tuple[str | int, ...], value: object) -> bytes:
    parsed = json.loads(encode_index(GOOD))
    inner = parsed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return json.dumps(parsed).encode()


DIGEST = {"blake3": "ab" * 32, "crc32c": 7}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "zip"),
        (("version",), 0),
        (("version",), True),
        (("version",), "1"),
        (("kind",), "pickle"),
        (("model",), ""),
        (("model",), "org/na\nme"),
        (("source",), "x" * 513),
        (("revision",), "\x1b[31m"),
        (("license",), 3),
        (("size_bytes",), 0),
        (("size_bytes",), -1),
        (("size_bytes",), 1 << 60),
        (("size_bytes",), 5000.0),
        (("size_bytes",), 100),
        (("size_bytes",), 50_000),
        (("alignment_bytes",), 32),
        (("alignment_bytes",), 0),
        (("chunk_bytes",), 0),
        (("chunk_bytes",), 5000),
        (("chunk_bytes",), 1 << 40),
        (("chunks",), []),
        (("chunks",), [DIGEST] * 3),
        (("chunks",), None),
        (("chunks", 0, "blake3"), "AB" * 32),
        (("chunks", 0, "blake3"), "../../etc/passwd"),
        (("chunks", 0, "crc32c"), 1 << 32),
        (("chunks", 0, "crc32c"), -1),
        (("tensors", 0, "name"), ""),
        (("tensors", 0, "name"), "a\x00b"),
        (("tensors", 0, "name"), "\u202etxt"),
        (("tensors", 0, "name"), "\ud800"),
        (("tensors", 0, "name"), "é" * 257),
        (("tensors", 0, "name"), "model.norm.weight"),
        (("tensors", 0, "dtype"), "F33"),
        (("tensors", 0, "dtype"), "Q4_0"),
        (("tensors", 0, "dtype"), "BF16"),
        (("tensors", 0, "shape"), [1] * 9),
        (("tensors", 0, "shape"), [-16]),
        (("tensors", 0, "shape"), [1 << 62, 4]),
        (("tensors", 0, "shape"), [1 << 32, 1 << 32]),
        (("tensors", 0, "shape"), [10**40]),
        (("tensors", 0, "size_bytes"), 63),
        (("tensors", 0, "offset"), 64),
        (("tensors", 0, "offset"), -64),
        (("tensors", 1, "offset"), 32),
        (("tensors", 1, "offset"), 65),
        (("tensors", 1, "offset"), 4992),
        (("tensors", 1, "offset"), 1 << 63),
        (("side_files", 0, "name"), "modeling.py"),
        (("side_files", 0, "name"), "../config.json"),
        (("side_files", 0, "name"), "/etc/passwd"),
        (("side_files", 0, "offset"), 64),
        (("side_files", 0, "size_bytes"), 65 << 20),
        (("side_files", 0, "size_bytes"), -1),
        (("aliases",), {"a": "no such tensor"}),
        (("aliases",), {"model.norm.weight": "model.embed_tokens.weight"}),
        (("aliases",), {"a\nb": "model.norm.weight"}),
        (("aliases",), []),
    ],
)
def test_what_cannot_be_true_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(CheckpointError):
        decode_index(_changed(path, value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"format": "sllm-checkpoint", "version": 1, "x": ' + b"[" * 100_000,
        b'{"format": "sllm-checkpoint", "version": NaN}',
        b'{"format": "sllm-checkpoint", "version": ' + b"9" * 5000 + b"}",
        b" " * (INDEX_BYTES_MAX + 1),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        decode_index(data)


def test_too_many_tensors_are_refused() -> None:
    many = json.loads(encode_index(GOOD))
    many["tensors"] = [
        {"name": str(n), "dtype": "U8", "shape": [0], "offset": 0, "size_bytes": 0}
        for n in range(200_001)
    ]
    with pytest.raises(CheckpointError, match="200001 tensors"):
        decode_index(msgspec.json.encode(many))


@pytest.mark.parametrize(
    ("key", "again"),
    [
        ('"size_bytes": 5000', '"size_bytes": 5000, "size_bytes": 5000'),
        ('"offset":64', '"offset":0,"offset":64'),
        ('"lm_head.weight": ', '"lm_head.weight": "model.norm.weight", "lm_head.weight": '),
        ('"size_bytes": 5000', '"size_bytes": 5000, "\\u0073ize_bytes": 5000'),
    ],
)
def test_a_key_that_occurs_twice_is_refused(key: str, again: str) -> None:
    text = encode_index(GOOD).decode()
    assert key in text
    with pytest.raises(CheckpointError, match="occurs twice"):
        decode_index(text.replace(key, again, 1).encode())


@given(st.integers(0, len(encode_index(GOOD)) - 1), st.integers(0, 7))
def test_no_flipped_bit_escapes_the_error_tree(position: int, bit: int) -> None:
    data = bytearray(encode_index(GOOD))
    data[position] ^= 1 << bit
    try:
        decode_index(bytes(data))  # another digest, say: still an index, but of another identity
    except CheckpointError:
        return
    assert checkpoint_id(bytes(data)) != checkpoint_id(encode_index(GOOD))


@given(st.integers(0, len(encode_index(GOOD)) - 3))
def test_no_truncated_index_is_accepted(length: int) -> None:
    with pytest.raises(CheckpointError):
        decode_index(encode_index(GOOD)[:length])


def test_a_gguf_brings_its_own_alignment_and_types() -> None:
    block = Tensor(
        name="blk.0.ffn_up.weight", dtype="Q4_0", shape=(2, 32), offset=96, size_bytes=36
    )
    index = index_of((block,), kind="gguf", alignment_bytes=32)
    assert decode_index(encode_index(index)) == index
    for wrong in (
        msgspec.structs.replace(block, shape=(32, 2)),  # blocks run along the last dimension
        msgspec.structs.replace(block, offset=100),
        msgspec.structs.replace(block, dtype="BF17"),
    ):
        with pytest.raises(CheckpointError):
            decode_index(encode_index(msgspec.structs.replace(index, tensors=(wrong,))))
    beside = (SideFile(name="config.json", offset=160, size_bytes=1),)
    with pytest.raises(CheckpointError, match="no side files"):
        decode_index(
            encode_index(index_of((block,), kind="gguf", size_bytes=200, side_files=beside))
        )


def test_layers_in_execution_order_whatever_the_order_of_the_bytes() -> None:
    names = [
        "output.weight",
        "token_embd.weight",
        "blk.10.x",
        "blk.2.b",
        "blk.2.a",
        "output_norm.w",
    ]
    index = index_of(tuple(tensor(name, 64 * n) for n, name in enumerate(names)))
    found = layers(index)
    assert [layer.name for layer in found] == ["embedding", "blk.2", "blk.10", "norm", "head"]
    assert found[1].offset == 3 * 64
    assert found[1].size_bytes == 2 * 64
    assert sum(len(layer.tensors) for layer in found) == len(names)


def test_names_what_lies_in_a_range() -> None:
    assert tensor_at(GOOD, 0, 1) == "model.embed_tokens.weight"
    assert tensor_at(GOOD, 64, 4000) == "model.norm.weight"
    assert tensor_at(GOOD, 130, 1) == "config.json"
    assert tensor_at(GOOD, 4096, 10) is None
