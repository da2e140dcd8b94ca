"""fastsafetensors to the CPU, by its way without GPUDirect Storage."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from bench.peers.timed import timed
from fastsafetensors import (  # type: ignore[import-not-found] # a peer's
    SafeTensorsFileLoader,
    SingleGroup,
)

(path,) = sys.argv[1:]
kept: list[object] = []  # its buffers, which the tensors are views of


def load() -> Mapping[str, torch.Tensor]:
    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True)
    loader.add_filenames({0: [path]})
    buffer = loader.copy_files_to_device()
    kept.append((loader, buffer))
    return {name: buffer.get_tensor(name) for name in buffer.key_to_rank_lidx}


timed(load)
