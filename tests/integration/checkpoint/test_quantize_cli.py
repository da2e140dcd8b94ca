"""`sllm convert --quantize` as it is run: a process that starts another, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.integration.checkpoint.hf_models import GROUPED, write_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from serverlessllm.checkpoint.index import decode_index
from serverlessllm.testing.waiting import eventually_blocking


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which every byte of a text is a token."""
    folder = tmp_path_factory.mktemp("originals") / "tiny"
    write_model(folder, LlamaConfig(**GROUPED), torch.bfloat16)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "serverlessllm.cli.main", *map(str, arguments)]


def sllm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=110)


def test_a_model_is_quantised_evaluated_and_shown(source, tmp_path):
    out = tmp_path / "out"
    done = sllm("convert", source, out, "--quantize", "int8", "--evaluate", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    report = told["quantization"]
    assert report["scheme"] == "int8"
    assert report["tensor_bytes"] < 0.8 * report["source_bytes"]
    assert 0 < report["error"] <= report["worst"]["error"] < 0.02
    assert len(report["quantized"]) == 14
    assert report["evaluation"]["tokens"] > 100
    assert report["evaluation"]["top1_agreement"] > 0.8
    assert 0 <= report["evaluation"]["kl_mean"] < 0.05
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    index = decode_index((out / "model.idx").read_bytes())
    assert (index.model, index.source) == ("tiny", "file:tiny")
    assert index.quantization is not None
    assert index.quantization.error == report["error"]
    shown = sllm("inspect", out)
    assert "int8, a scale for each row, by compressed-tensors" in shown.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_on_the_way(number, source, tmp_path):
    """A signal leaves nothing but for SIGKILL, after which the next run has the field to itself."""
    work = tmp_path / ".out.quantizing" / "folder"
    running = subprocess.Popen(
        command("convert", source, tmp_path / "out", "--quantize", "int8"),
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    eventually_blocking(work.exists)
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    assert not (tmp_path / "out" / "model.idx").exists()
    # Nobody is left of those that it started.
    eventually_blocking(lambda: not group_lives(running.pid))
    if number == signal.SIGKILL:
        assert running.returncode == -signal.SIGKILL
        (tmp_path / "again").mkdir()
        done = sllm("convert", source, tmp_path / "out", "--quantize", "int8")
        assert done.returncode == 0, done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"out", "again"}
    else:
        assert running.returncode == 130, said
        assert not list(tmp_path.iterdir())


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
