"""GGUF: our reader against the library's, and against headers that lie."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.checkpoint.convert import plan_layout
from serverlessllm.checkpoint.sources.base import MemoryFile, open_file
from serverlessllm.checkpoint.sources.gguf import GGUFHeader, read_header
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint
from serverlessllm.testing.checkpoints import raw_checkpoint, write_random_gguf


@pytest.mark.parametrize("alignment", [32, 256])
def test_reads_what_the_library_reads(tmp_path: Path, alignment: int) -> None:
    path = write_random_gguf(tmp_path / "m.gguf", alignment=alignment)
    header = read_header(open_file(path, model="m").files["m.gguf"])
    theirs = sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.data_offset)
    assert [(t.name, t.dtype, t.shape, t.offset, t.size_bytes) for t in header.tensors] == [
        (
            t.name,
            t.tensor_type.name,
            tuple(int(dim) for dim in reversed(t.shape)),
            int(t.data_offset),
            int(t.n_bytes),
        )
        for t in theirs
    ]
    assert header.alignment_bytes == alignment
    assert header.architecture == "llama"
    assert header.license == "apache-2.0"


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def row(
    name: str = "blk.0.w",
    dims: tuple[int, ...] = (32, 2),
    kind: int = 2,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    rank = len(dims) if rank is None else rank
    packed = struct.pack("<I", rank) + struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + packed + struct.pack("<IQ", kind, offset)


def file_of(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    pairs: tuple[bytes, ...] = (),
    rows: tuple[bytes, ...] = (row(),),
    counts: tuple[int, int] | None = None,
    data: int = 64,
) -> MemoryFile:
    tensors, metadata = counts or (len(rows), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensors, metadata) + b"".join((*pairs, *rows))
    return MemoryFile("m.gguf", head + bytes(-len(head) % 32 + data))


def read(**fields: object) -> GGUFHeader:
    return read_header(file_of(**fields))  # type: ignore[arg-type]


ARRAY_OF_U8 = struct.pack("<IQ", 0, 3) + b"abc"
ARRAY_OF_TEXT = struct.pack("<IQ", 8, 2) + text("one") + text("two")


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_metadata_is_passed_over(version: int) -> None:
    scalars = (b"\1", b"\1", b"12", b"12", b"1234", b"1234", b"1234", b"\1")
    pairs = tuple(pair(f"k{kind}", kind, value) for kind, value in enumerate(scalars))
    pairs += (pair("k8", 8, text("x" * 10_000)), pair("a", 9, ARRAY_OF_U8))
    pairs += (pair("b", 9, ARRAY_OF_TEXT),)
    pairs += tuple(pair(f"k{kind}", kind, b"12345678") for kind in (10, 11, 12))
    pairs += (pair("general.architecture", 8, text("llama")),)
    header = read(version=version, pairs=pairs)
    assert header.architecture == "llama"
    [tensor] = header.tensors
    assert (tensor.dtype, tensor.shape, tensor.size_bytes) == ("Q4_0", (2, 32), 36)
    assert tensor.offset % 32 == 0


HUGE = (1 << 64) - 1
LIES: dict[str, dict[str, object]] = {
    "another magic": {"magic": b"GGML"},
    "more tensors than there are": {"counts": (2, 0)},
    "a huge number of tensors": {"counts": (HUGE, 0)},
    "200,001 tensors": {"counts": (200_001, 0)},
    "a huge number of pairs": {"counts": (1, HUGE)},
    "a text past the end": {"pairs": (struct.pack("<Q", HUGE) + b"x",)},
    "a key past the end": {"pairs": (struct.pack("<Q", 400) + b"x",)},
    "a value past the end": {"pairs": (pair("k", 8, struct.pack("<Q", 1 << 40)),)},
    "an array past the end": {"pairs": (pair("k", 9, struct.pack("<IQ", 10, 1 << 40)),)},
    "an array that wraps": {"pairs": (pair("k", 9, struct.pack("<IQ", 10, 1 << 61)),)},
    "a huge array of texts": {"pairs": (pair("k", 9, struct.pack("<IQ", 8, HUGE)),)},
    "an array of arrays": {"pairs": (pair("k", 9, struct.pack("<IQ", 9, 1)),)},
    "an unknown type": {"pairs": (pair("k", 13, b""),)},
    "an array of an unknown type": {"pairs": (pair("k", 9, struct.pack("<IQ", 99, 1)),)},
    "a key twice": {"pairs": (pair("k", 0, b"1"), pair("k", 0, b"2"))},
    "an empty key": {"pairs": (pair("", 0, b"1"),)},
    "a key that is not UTF-8": {"pairs": (text(b"\xff") + struct.pack("<I", 0) + b"1",)},
    "an alignment of 0": {"pairs": (pair("general.alignment", 4, struct.pack("<I", 0)),)},
    "an alignment of 48": {"pairs": (pair("general.alignment", 4, struct.pack("<I", 48)),)},
    "a huge alignment": {"pairs": (pair("general.alignment", 4, struct.pack("<I", 1 << 30)),)},
    "a negative alignment": {"pairs": (pair("general.alignment", 5, struct.pack("<i", -32)),)},
    "a text for an alignment": {"pairs": (pair("general.alignment", 8, text("32")),)},
    "a licence that acts on a terminal": {"pairs": (pair("general.license", 8, text("\x1b[2J")),)},
    "a licence of a book's length": {"pairs": (pair("general.license", 8, text("x" * 5000)),)},
    "an unknown tensor type": {"rows": (row(kind=4),)},
    "a huge tensor type": {"rows": (row(kind=0xFFFFFFFF),)},
    "five dimensions": {"rows": (row(dims=(32, 1, 1, 1, 1)),)},
    "a huge number of dimensions": {"rows": (row(rank=0xFFFFFFFF),)},
    "a product that wraps": {"rows": (row(dims=(1 << 32, 1 << 32)),)},
    "a product that wraps to the right size": {"rows": (row(dims=(32, (1 << 59) + 2)),)},
    "a row that fills no block": {"rows": (row(dims=(31, 2)),)},
    "a tensor past the end": {"rows": (row(dims=(32, 8)),)},
    "an offset past the end": {"rows": (row(offset=1 << 40),)},
    "an offset that wraps": {"rows": (row(offset=HUGE - 31),)},
    "an offset that is not aligned": {"rows": (row(offset=8),)},
    "an overlap": {"rows": (row("a"), row("b", offset=32))},
    "a name twice": {"rows": (row("a", (32, 1)), row("a", (32, 1), offset=32))},
    "an empty name": {"rows": (row(""),)},
    "a name with a line break": {"rows": (row("a\nb"),)},
    "too long a name": {"rows": (row("x" * 513),)},
}


@pytest.mark.parametrize("fields", LIES.values(), ids=LIES)
def test_a_lying_header_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        read(**fields)


@pytest.mark.parametrize(
    ("fields", "way_out"),
    [
        ({"version": 1}, "convert it again"),
        ({"version": 4}, "reads 2 and 3"),
        ({"version": 3 << 24}, "big-endian"),
        ({"pairs": (pair("split.count", 2, struct.pack("<H", 3)),)}, "--merge"),
    ],
)
def test_what_we_do_not_read_names_the_way_out(fields: dict[str, Any], way_out: str) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=way_out):
        read(**fields)


def test_a_header_without_end_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pair("k", 8, struct.pack("<Q", 1 << 39))
    )
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError, match="too long"):
        read_header(open_file(path, model="m").files["m.gguf"])


SMALL = file_of(pairs=(pair("general.alignment", 4, struct.pack("<I", 32)),)).data


@given(st.integers(0, len(SMALL) - 65), st.integers(0, 255))
def test_no_changed_byte_escapes_the_error_tree(position: int, value: int) -> None:
    data = bytearray(SMALL)
    data[position] = value
    try:
        header = read_header(MemoryFile("m.gguf", bytes(data)))
    except CheckpointError:
        return
    assert all(t.offset + t.size_bytes <= len(data) for t in header.tensors)


@given(st.integers(0, len(SMALL) - 64 + 35))
def test_no_truncated_file_is_accepted(length: int) -> None:
    with pytest.raises(CheckpointError):
        read_header(MemoryFile("m.gguf", SMALL[:length]))


def test_the_bin_is_the_file(tmp_path: Path) -> None:
    path = write_random_gguf(tmp_path / "m.gguf")
    layout = plan_layout(raw_checkpoint({"m.gguf": path.read_bytes(), "README.md": b"x"}))
    data = bytearray(layout.size_bytes)
    layout.read_into(0, memoryview(data))
    assert data == path.read_bytes()
    assert layout.kind == "gguf"
    assert layout.side_files == ()


def test_a_file_without_tensors_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no tensors"):
        plan_layout(raw_checkpoint({"m.gguf": file_of(rows=()).data}))
