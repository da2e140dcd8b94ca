"""InstantTensor to the CPU, should it ever take it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import instanttensor  # type: ignore[import-not-found] # a peer's
import torch
from bench.peers.timed import timed

(path,) = sys.argv[1:]


def load() -> Mapping[str, torch.Tensor]:
    with instanttensor.safe_open(path, framework="pt", device="cpu") as file:
        return dict(file.tensors())


timed(load)
