"""Adapters as PEFT saves them: checkpoints of their own that name their base."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import decode_index, layers
from serverlessllm.checkpoint.sources.adapter import base_name
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.checkpoint.sources.pick import pick
from serverlessllm.cli.inspect import inspect
from serverlessllm.core.errors import CheckpointError
from serverlessllm.testing.checkpoints import RawTensorData, raw_checkpoint, safetensors_bytes

RANK, WIDTH = 4, 16
CONFIG = {
    "auto_mapping": None,
    "base_model_name_or_path": "org/base-1B",
    "lora_alpha": 8,
    "peft_type": "LORA",
    "r": RANK,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}


def weights() -> bytes:
    tensors = {}
    for layer in (1, 0):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        for name, shape in (("B", (WIDTH, RANK)), ("A", (RANK, WIDTH))):
            data = struct.pack("<64f", *range(64))
            tensors[f"{stem}{name}.weight"] = RawTensorData("F32", shape, data)
    return safetensors_bytes(tensors, {"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `save_pretrained` of a PEFT model leaves, and a trainer around it."""
    made = tmp_path / "adapter"
    made.mkdir()
    (made / "adapter_model.safetensors").write_bytes(weights())
    (made / "adapter_config.json").write_text(json.dumps(CONFIG, indent=2))
    (made / "tokenizer_config.json").write_text("{}")
    for name in ("README.md", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (made / name).write_bytes(b"\x80\x02.")
    return made


def test_an_adapter_names_its_base_and_keeps_its_bytes(folder: Path, tmp_path: Path) -> None:
    done = convert(open_folder(folder, model="org/tuned"), tmp_path / "out")
    index = decode_index(done.idx_path.read_bytes())
    assert (index.kind, index.base, index.model) == ("tensors", "org/base-1B", "org/tuned")
    assert index.architecture is None
    assert [file.name for file in index.side_files] == [
        "adapter_config.json",
        "tokenizer_config.json",
    ]
    assert [layer.name for layer in layers(index)] == [
        "base_model.model.model.layers.0",
        "base_model.model.model.layers.1",
    ]
    stored = done.bin_path.read_bytes()
    side = index.side_files[0]
    assert stored[side.offset : side.offset + side.size_bytes] == (
        (folder / "adapter_config.json").read_bytes()
    )
    for tensor in index.tensors:
        assert stored[tensor.offset : tensor.offset + tensor.size_bytes] == struct.pack(
            "<64f", *range(64)
        )


def test_inspect_says_whose_adapter_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(open_folder(folder, model="org/tuned"), tmp_path / "out")
    inspect(str(tmp_path / "out"))
    assert "adapter of    org/base-1B" in capsys.readouterr().out


def test_a_whole_model_comes_before_an_adapter() -> None:
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert pick(adapter).adapter
    assert not pick([*adapter, "model.safetensors"]).adapter
    assert not pick([*adapter, "m.gguf"]).adapter
    for alone in adapter:
        with pytest.raises(CheckpointError):
            pick([alone])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/base", "org/base"),
        ("base-1B", "base-1B"),
        ("org/base@main", "org/base"),
        ("/home/somebody/models/base-1B", "base-1B"),
        ("/home/somebody/models/base-1B/", "base-1B"),
        ("./out/base", "base"),
        ("a/b/c", "c"),
        (r"C:\models\base", "base"),
        ("/root/.cache/huggingface/hub/models--org--base-1B/snapshots/0123abcd", "org/base-1B"),
        ("/x/models--gpt2/snapshots/0123abcd/", "gpt2"),
    ],
)
def test_a_path_of_another_machine_is_no_name(text: str, name: str) -> None:
    assert base_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "..", "a\x1b[31m", "x" * 600, "/models/.hidden", "a b"),
        *("https://example.org/org/base", "file:///etc/passwd", "a/..", "../..", "~"),
        *("org/base\0", "\u202eorg/base", "org/\u0661"),
    ],
)
def test_what_names_no_model_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="base_model_name_or_path"):
        base_name(text)


@pytest.mark.parametrize(
    "config",
    [b"{}", b"[]", b"{", b'{"base_model_name_or_path": 3}', b'{"base_model_name_or_path": null}'],
)
def test_a_configuration_without_a_base_is_refused(config: bytes, tmp_path: Path) -> None:
    files = {"adapter_model.safetensors": weights(), "adapter_config.json": config}
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        convert(raw_checkpoint(files), tmp_path / "out")


def test_the_module_that_peft_would_import_is_taken_out(tmp_path: Path) -> None:
    named = CONFIG | {"auto_mapping": {"base_model_class": "C", "parent_library": "evil"}}
    files = {
        "adapter_model.safetensors": weights(),
        "adapter_config.json": json.dumps(named).encode(),
    }
    stored = convert(raw_checkpoint(files), tmp_path / "out").bin_path.read_bytes()
    assert b"evil" not in stored
    assert b"org/base-1B" in stored
