"""What torch itself saves: converted, byte for byte what its tensors are."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from serverlessllm.checkpoint.convert import Converted, convert
from serverlessllm.checkpoint.sources.base import open_file, open_folder
from serverlessllm.core.errors import UnsupportedCheckpoint

DTYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    if plain.numel() == 0:
        return b""
    data: bytes = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def check(done: Converted, expected: dict[str, torch.Tensor]) -> None:
    """Every name leads to the bytes, the shape and the size of its tensor."""
    data = done.bin_path.read_bytes()
    found = {tensor.name: tensor for tensor in done.index.tensors}
    assert found.keys() | done.index.aliases.keys() == expected.keys()
    for name, tensor in expected.items():
        kept = found[done.index.aliases.get(name, name)]
        assert kept.shape == tuple(tensor.shape), name
        assert data[kept.offset : kept.offset + kept.size_bytes] == raw_bytes(tensor), name


def zoo() -> dict[str, torch.Tensor]:
    """Every dtype, plain and transposed, and views of one storage."""
    found = {}
    for name in DTYPES:
        matrix = torch.arange(12).to(torch.float32).to(getattr(torch, name)).reshape(3, 4)
        found[name] = matrix
        found[f"{name}.T"] = matrix.T
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    found |= {
        "whole": base,
        "row": base[1],
        "column": base[:, 2],
        "every other": base[:, ::2, 1:4],
        "permuted": base.permute(2, 0, 1),
        "expanded": base[0, :1].expand(6, 5),
        "flat": base.view(-1),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }
    found["attributed"] = torch.ones(4)
    found["attributed"].note = "kept by nobody"  # type: ignore[attr-defined] # a tensor may
    return found


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_view(protocol: int, tmp_path: Path) -> None:
    torch.save(zoo(), tmp_path / "m.pt", pickle_protocol=protocol)
    check(convert(open_file(tmp_path / "m.pt", model="m"), tmp_path / "out"), zoo())


def test_a_module_with_tied_weights_in_a_training_checkpoint(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False))
    module[1].weight = module[0].weight
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.tensor([1])).sum().backward()
    optimizer.step()
    saved = {
        "epoch": 3,
        "loss": 0.5,
        "args": {"lr": 1e-3, "name": "x"},
        "model_state_dict": module.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    torch.save(saved, tmp_path / "last.pth")
    done = convert(open_file(tmp_path / "last.pth", model="m"), tmp_path / "out")
    check(done, module.state_dict())
    assert done.index.aliases == {"1.weight": "0.weight"}


def projects() -> tuple[dict[str, torch.Tensor], dict[str, tuple[object, str]]]:
    """A state dict; what trainers save of it, and what they put before its names."""
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.tensor([1])).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60]).state_dict()
    state = module.state_dict()
    assert hasattr(state, "_metadata")  # what BUILD is for
    lightning = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict((f"model.{name}", tensor) for name, tensor in state.items()),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'mode': 'min'}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule],
        "hyper_parameters": {
            "betas": (0.9, 0.95),
            "dtype": torch.bfloat16,
            "device": torch.device("cuda:0"),
            "size": torch.Size([1, 2]),
            "sets": [{1, 2}, set(), frozenset("ab")],
            "bytes": [b"\x00\xff", bytearray(b"x")],
            "complex": 1j,
            "by number": {0: "a", 0.5: "b", None: "c"},
        },
    }
    deepspeed = {"module": state, "sparse_tensor_module_names": set(), "ds_version": "0.17"}
    averaged = {"model": state, "ema": {"shadow": state}, "rng": torch.get_rng_state()}
    return state, {
        "a state dict": (state, ""),
        "Lightning": (lightning, "model."),
        "DistributedDataParallel": ({f"module.{k}": v for k, v in state.items()}, "module."),
        "torch.compile": ({f"_orig_mod.{k}": v for k, v in state.items()}, "_orig_mod."),
        "DeepSpeed": (deepspeed, ""),
        "a moving average": (averaged, ""),
    }


@pytest.mark.parametrize("protocol", [2, 5])
def test_what_trainers_save(protocol: int, tmp_path: Path) -> None:
    state, saved_by = projects()
    for project, (saved, prefix) in saved_by.items():
        path = tmp_path / f"{project}.ckpt"
        torch.save(saved, path, pickle_protocol=protocol)
        done = convert(open_file(path, model="m"), tmp_path / project)
        check(done, {prefix + name: tensor for name, tensor in state.items()})


def test_a_sharded_folder_equals_its_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {f"model.layers.{n}.w": torch.randn(4, n + 1).to(torch.bfloat16) for n in range(6)}
    names = list(tensors)
    folder, other = tmp_path / "torch", tmp_path / "safetensors"
    folder.mkdir()
    other.mkdir()
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:3], names[3:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(tensors, other / "model.safetensors")
    done = convert(open_folder(folder, model="m", source="file:same"), tmp_path / "a")
    same = convert(open_folder(other, model="m", source="file:same"), tmp_path / "b")
    check(done, tensors)
    assert done.id == same.id


def test_a_large_transpose(tmp_path: Path) -> None:
    matrix = torch.arange(3000 * 1700, dtype=torch.int32).reshape(3000, 1700)
    torch.save({"w": matrix.T, "part": matrix[:, 100:900]}, tmp_path / "m.pt")
    done = convert(open_file(tmp_path / "m.pt", model="m"), tmp_path / "out", chunk_bytes=1 << 20)
    check(done, {"w": matrix.T, "part": matrix[:, 100:900]})


REFUSED = {
    "a whole module": (torch.nn.Linear(2, 2), "Linear"),
    "a module in a dict": ({"model": torch.nn.Linear(2, 2)}, r"at 'model': .*model\.state_dict"),
    "a number of NumPy's": (
        {"model": {"a": torch.ones(2)}, "best": {"loss": np.float64(3.0), "at": 1}},
        r"at 'best'/'loss': refers to 'numpy\.\w+\.multiarray\.scalar', a NumPy value.*item",
    ),
    "an array": ({"a": torch.ones(2), "mean": np.ones(3)}, "at 'mean': .*a NumPy value"),
    "a path": ({"a": torch.ones(2), "out": Path("/x")}, r"at 'out': .*PosixPath.*state_dict"),
    "windows": ({"a": torch.arange(6.0).unfold(0, 3, 1)}, r"'a': its elements overlap.*contig"),
    "names that are numbers": ({0: torch.ones(2)}, "name is not text, but '0'"),
    "no tensors": ({"lr": 0.1, 3: None}, r"no tensors at its top \('lr', '3'\)"),
    "a tensor": (torch.ones(2), "not a dict"),
    "a sparse tensor": ({"a": torch.eye(3).to_sparse()}, "sparse"),
    "a conjugated tensor": ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "resolve_conj"),
    "a negated tensor": (
        {"a": torch.ones(2, dtype=torch.complex64).conj().imag},
        "resolve_conj",
    ),
    "complex128": ({"a": torch.ones(2, dtype=torch.complex128)}, "complex64"),
    "the meta device": ({"a": torch.ones(2, device="meta")}, "no bytes"),
    "a namespace": ({"a": torch.ones(2), "args": argparse.Namespace(x=1)}, r"argparse\.Namespace"),
    "tensors in a list": ({"a": torch.ones(2), "more": [torch.ones(2)]}, "'more' holds tensors"),
}


@pytest.mark.parametrize(("saved", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_says_why_and_the_way_out(
    saved: object, says: str, tmp_path: Path
) -> None:
    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(UnsupportedCheckpoint, match=rf"(?s)m\.pt: .*{says}.*save_file"):
        convert(open_file(tmp_path / "m.pt", model="m"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_legacy_layout_is_refused(tmp_path: Path) -> None:
    torch.save(zoo(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedCheckpoint, match=r"before 1\.6.*save it again"):
        convert(open_file(tmp_path / "m.pt", model="m"), tmp_path / "out")
