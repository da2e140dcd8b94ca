"""Damage and lies: what is never served, what heals, and how the rest is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.served import Served, serving, serving_anew

from serverlessllm.testing.answers import ask_chat, check_error
from serverlessllm.testing.management import call, register


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_anew(tmp_path_factory.mktemp("faults")) as system:
        yield system


def flip(path: Path) -> None:
    """Turn one bit in the middle."""
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Lose the last third."""
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size * 2 // 3)


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "gone": Path.unlink}


# A published checkpoint that somebody damaged


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.bin", "model.idx"])
def test_a_damaged_checkpoint_in_the_store(system, weights, name, damage):
    model = f"stored-{damage}-{name}"
    register(system.address, model=model, source=weights.as_uri(), backend="fake")
    call(system.address, "POST", "/api/pull", {"model": model})
    whole = (system.stored(model) / "model.bin").read_bytes()
    DAMAGES[damage](system.stored(model) / name)

    code = {"gone": "checkpoint_missing"}.get(damage, "invalid_checkpoint")
    if (name, damage) == ("model.bin", "flipped"):
        code = "corrupt_chunk"
    refused = ask_chat(system.address, model)
    message = check_error(refused, 503, code)
    assert refused.headers["x-should-retry"] == "false"
    assert "sllm " in message
    assert not any(path.exists() for path in system.copies("dram", model))
    assert not any(path.exists() for path in system.copies("nvme", model))

    # The cure that the message names.
    if code == "corrupt_chunk":
        call(system.address, "DELETE", f"/api/models/{model}")
        register(system.address, model=model, source=weights.as_uri(), backend="fake")
    call(system.address, "POST", "/api/pull", {"model": model})
    assert ask_chat(system.address, model).status == 200
    assert system.copies("dram", model)[0].read_bytes() == whole
    assert system.leftovers() == []


def test_a_store_that_is_gone_does_not_stop_what_is_cached(system, weights):
    register(system.address, model="cached", source=weights.as_uri(), backend="fake")
    assert ask_chat(system.address, "cached").status == 200
    system.unload("cached", level=1)
    store = system.data_dir / "store"
    store.rename(store.with_name("away"))
    try:
        assert ask_chat(system.address, "cached").status == 200
    finally:
        store.with_name("away").rename(store)


# The tiers heal


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", [0, 1], ids=["bin", "idx"])
def test_a_damaged_nvme_copy_is_never_served(system, weights, part, damage):
    model = f"nvme-{damage}-{part}"
    register(system.address, model=model, source=weights.as_uri(), backend="llamacpp")
    asked: Any = {"max_tokens": 4, "temperature": 0, "seed": 1}
    answer = ask_chat(system.address, model, **asked).json()["choices"]
    system.unload(model, level=2)
    DAMAGES[damage](system.copies("nvme", model)[part])

    assert ask_chat(system.address, model, **asked).json()["choices"] == answer
    whole = (system.stored(model) / "model.bin").read_bytes()
    assert system.copies("dram", model)[0].read_bytes() == whole
    system.unload(model, level=2)  # which waits for the copy that is written again
    assert system.copies("nvme", model)[0].read_bytes() == whole
    assert system.leftovers() == []


def test_damaged_leftovers_in_dram_are_never_adopted(data_dir, weights):
    damages = {f"{damage}-{part}": (damage, part) for damage in DAMAGES for part in (0, 1)}
    with serving(data_dir, {}) as system:
        for model in damages:
            register(system.address, model=model, source=weights.as_uri(), backend="fake")
            assert ask_chat(system.address, model).status == 200
        whole = (system.stored(model) / "model.bin").read_bytes()
        copies = {model: system.copies("dram", model) for model in damages}
    for model, (damage, part) in damages.items():
        DAMAGES[damage](copies[model][part])
    with serving(data_dir, {}) as system:
        for model in damages:
            answer = ask_chat(system.address, model)
            assert answer.status == 200
            assert copies[model][0].read_bytes() == whole, model
        assert system.leftovers() == []


# Sources that lie, or are not there


def _lying_gguf(weights: Path, folder: Path) -> Path:
    data = bytearray(weights.read_bytes())
    data[8:16] = struct.pack("<Q", 1 << 60)  # the number of tensors
    (folder / "lying.gguf").write_bytes(data)
    return folder / "lying.gguf"


def _cut_gguf(weights: Path, folder: Path) -> Path:
    (folder / "cut.gguf").write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder / "cut.gguf"


def _huge_header(_: Path, folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    return folder


def _overlap(_: Path, folder: Path) -> Path:
    row = {"dtype": "F32", "shape": [4]}
    header = json.dumps(
        {"a": row | {"data_offsets": [0, 16]}, "b": row | {"data_offsets": [8, 24]}}
    ).encode()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(24)
    )
    return folder


def _pickle(_: Path, folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nabort\n)R.")
    return folder


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (_lying_gguf, "invalid_checkpoint", "lying.gguf"),
        (_cut_gguf, "invalid_checkpoint", "outside of the file"),
        (_huge_header, "invalid_checkpoint", "does not fit"),
        (_overlap, "invalid_checkpoint", "overlaps"),
        (_pickle, "unsupported_checkpoint", "safetensors"),
    ],
)
def test_a_source_that_cannot_be_converted(system, weights, tmp_path, make, code, says):
    source = make(weights, tmp_path)
    register(system.address, model=make.__name__[1:], source=source.as_uri(), backend="fake")
    refused = ask_chat(system.address, make.__name__[1:])
    assert says in check_error(refused, 503, code)
    assert refused.headers["x-should-retry"] == "false"
    assert str(tmp_path) not in refused.body.decode()
    assert system.leftovers() == []


def test_a_source_that_does_not_exist(system, tmp_path):
    missing = tmp_path / "missing.gguf"
    register(system.address, model="missing", source=missing.as_uri(), backend="fake")
    refused = ask_chat(system.address, "missing")
    assert "missing.gguf" in check_error(refused, 404, "model_not_found")
    assert refused.json()["error"]["param"] == "model"


def test_a_client_cannot_name_a_file_of_the_server(system, weights):
    """Only the operator may: not as a model's name, not on demand."""
    for name in (weights.as_uri(), f"file:{weights}", str(weights), f"../{weights.name}"):
        refused = ask_chat(system.address, name)
        check_error(refused, 400, "invalid_model_name")
        assert refused.json()["error"]["param"] == "model"
    refused = ask_chat(system.address, "nobody")
    assert "registered: " in check_error(refused, 404, "model_not_found")
