"""Side files: a closed list, and no name of code in them."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from serverlessllm.checkpoint.side_files import (
    CONFIG_BYTES_MAX,
    SIDE_FILE_BYTES_MAX,
    ModelConfig,
    collect_side_files,
    is_side_file,
)
from serverlessllm.checkpoint.sources.base import open_folder, read_all
from serverlessllm.core.errors import CheckpointError
from serverlessllm.testing.checkpoints import raw_checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "sentencepiece.bpe.model",
    ],
)
def test_engines_get_what_they_need(name: str) -> None:
    assert is_side_file(name)


@pytest.mark.parametrize(
    "name",
    [
        "modeling_llama.py",
        "config.json.py",
        "../config.json",
        "a/config.json",
        "config.json\n",
        "tokenizer/../../x.json",
        "pytorch_model.bin",
        "tokenizer.pkl",
        "README.md",
        "",
        "ⅷ_config.json",
    ],
)
def test_nothing_else_travels(name: str) -> None:
    assert not is_side_file(name)


def collected(files: dict[str, bytes]) -> tuple[dict[str, bytes], ModelConfig]:
    found, config = collect_side_files(raw_checkpoint(files))
    return {file.name: read_all(file, 1 << 20) for file in found}, config


def test_a_config_without_code_keeps_its_bytes() -> None:
    text = b'{"architectures":["LlamaForCausalLM"],  "limit": Infinity}'
    files, config = collected({"config.json": text, "x.py": b"import os"})
    assert files == {"config.json": text}
    assert config == ModelConfig(architecture="LlamaForCausalLM")


def test_names_of_code_are_taken_out_at_any_depth() -> None:
    content = {
        "auto_map": {"AutoModel": "modeling.Model"},
        "text_config": {"auto_map": {"AutoConfig": "x.y"}, "eps": 1e-05},
        "list": [{"custom_pipelines": {}}],
        "tie_word_embeddings": True,
    }
    text = json.dumps(content).replace("auto_map", "\\u0061uto_map", 1).encode()
    files, config = collected({"config.json": text, "tokenizer_config.json": text})
    for data in files.values():
        assert json.loads(data) == {
            "text_config": {"eps": 1e-05},
            "list": [{}],
            "tie_word_embeddings": True,
        }
    assert config.tied_embeddings


def test_a_vocabulary_may_have_the_word_auto_map() -> None:
    text = b'{"model": {"vocab": {"auto_map": 1}}}'
    assert collected({"tokenizer.json": text})[0] == {"tokenizer.json": text}


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_config_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        collected({"config.json": text})


@pytest.mark.parametrize("value", [None, "x", [], [None], [""], {}])
def test_odd_architectures_are_none(value: object) -> None:
    text = json.dumps({"architectures": value}).encode()
    assert collected({"config.json": text})[1].architecture is None


@pytest.mark.parametrize(
    ("name", "size_bytes"),
    [("tokenizer.json", SIDE_FILE_BYTES_MAX + 1), ("config.json", CONFIG_BYTES_MAX + 1)],
)
def test_too_long_a_file_is_refused_before_it_is_read(
    tmp_path: Path, name: str, size_bytes: int
) -> None:
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, size_bytes)
    with pytest.raises(CheckpointError, match=name):
        collect_side_files(open_folder(tmp_path, model="m"))


@pytest.mark.parametrize("depth", [300, 600, 900, 5000])
@pytest.mark.parametrize(("begin", "end"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_deep_config_is_taken_or_refused(depth: int, begin: bytes, end: bytes) -> None:
    text = b'{"x":' + begin * depth + b"1" + end * depth + b"}"
    with suppress(CheckpointError) if depth > 300 else nullcontext():
        assert collected({"config.json": text})[0] == {"config.json": text}
