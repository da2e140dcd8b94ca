"""torch.load: `plain` reads into memory, `mmap` maps the file. `save` makes the file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from bench.peers.timed import timed

mode, path, *rest = sys.argv[1:]


def load() -> Mapping[str, torch.Tensor]:
    tensors: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", mmap=mode == "mmap")
    return tensors


def save(source: str) -> None:
    """From a safetensors file, whose header is JSON."""
    import json
    import mmap

    with Path(source).open("rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(whole[:8], "little")
    tensors = {}
    for name, entry in json.loads(whole[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = torch.frombuffer(
                whole, dtype=torch.uint8, count=end - begin, offset=start + begin
            )
            tensors[name] = data.view(torch.bfloat16).reshape(entry["shape"])
    torch.save(tensors, path)


if mode == "save":
    save(*rest)
else:
    timed(load)
