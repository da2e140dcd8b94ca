"""safetensors' `load_file` with either of its backends: `mmap` (its default) or `pread`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from bench.peers.timed import timed
from safetensors.torch import load_file

mode, path = sys.argv[1:]


def load() -> Mapping[str, torch.Tensor]:
    tensors: Mapping[str, torch.Tensor] = load_file(path, backend=mode)
    return tensors


timed(load)
