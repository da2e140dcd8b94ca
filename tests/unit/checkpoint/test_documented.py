"""The specification's example is what the code really makes."""

from __future__ import annotations

import struct
from pathlib import Path

from serverlessllm.checkpoint import bounds, dtypes, side_files
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import checkpoint_id, decode_index
from serverlessllm.checkpoint.sources.base import MemoryFile, RawCheckpoint
from serverlessllm.testing.checkpoints import RawTensorData, safetensors_bytes

SPECIFICATION = Path(__file__).parents[3] / "docs" / "checkpoint-format.md"


def blocks(language: str) -> list[str]:
    parts = SPECIFICATION.read_text(encoding="utf-8").split(f"```{language}\n")[1:]
    return [part.partition("```")[0] for part in parts]


def example() -> RawCheckpoint:
    square = struct.pack("<4f", 1, 2, 3, 4)
    tensors = {
        "lm_head.weight": RawTensorData("F32", (2, 2), square),
        "model.embed_tokens.weight": RawTensorData("F32", (2, 2), square),
        "model.layers.0.mlp.up_proj.weight": RawTensorData(
            "BF16", (2, 2), bytes.fromhex("803f004040408040")
        ),
        "model.norm.weight": RawTensorData("F32", (2,), struct.pack("<2f", 1, 1)),
    }
    config = b'{"architectures": ["LlamaForCausalLM"]}\n'
    return RawCheckpoint(
        files={
            "model.safetensors": MemoryFile("model.safetensors", safetensors_bytes(tensors)),
            "config.json": MemoryFile("config.json", config),
        },
        model="example/tiny",
        source="hf://example/tiny",
        revision="0123456789abcdef0123456789abcdef01234567",
        license="apache-2.0",
    )


def dump(data: bytes) -> str:
    """As `od -A x -t x1z` prints: repeated lines are one `*`."""
    lines: list[str] = []
    before = None
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        if row == before:
            if lines[-1] != "*":
                lines.append("*")
            continue
        before = row
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:06x} {row.hex(' '):<47}  >{shown}<")
    return "\n".join([*lines, f"{len(data):06x}", ""])


def test_the_example_is_what_the_code_makes(tmp_path: Path) -> None:
    done = convert(example(), tmp_path)
    assert blocks("json") == [done.idx_path.read_text(encoding="utf-8")]
    assert blocks("console") == [dump(done.bin_path.read_bytes())]
    assert done.id in SPECIFICATION.read_text(encoding="utf-8")


def test_the_documented_index_is_accepted() -> None:
    idx = blocks("json")[0].encode()
    assert decode_index(idx).model == "example/tiny"
    assert checkpoint_id(idx) in SPECIFICATION.read_text(encoding="utf-8")


def test_every_bound_and_dtype_is_documented() -> None:
    text = SPECIFICATION.read_text(encoding="utf-8")
    for dtype in dtypes.SAFETENSORS_BITS:
        assert f"`{dtype}`" in text
    for bound in (
        f"{bounds.INDEX_BYTES_MAX >> 20} MiB",
        f"{bounds.BIN_BYTES_MAX >> 40} TiB",
        f"{bounds.TENSORS_MAX:,} tensors",
        f"{bounds.NAME_BYTES_MAX} bytes",
        f"{dtypes.DIMS_MAX} dimensions",
        f"{side_files.SIDE_FILES_MAX} side files",
        f"{side_files.SIDE_FILE_BYTES_MAX >> 20} MiB each",
    ):
        assert bound in text, bound
