"""tensorizer to the CPU. `save` makes its file from one of torch's."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from bench.peers.timed import timed
from tensorizer import (  # type: ignore[import-not-found] # a peer's
    TensorDeserializer,
    TensorSerializer,
)

mode, path, *rest = sys.argv[1:]


def load() -> Mapping[str, torch.Tensor]:
    return dict(TensorDeserializer(path, device="cpu"))


def save(source: str) -> None:
    serializer = TensorSerializer(path)
    serializer.write_state_dict(torch.load(source, mmap=True))
    serializer.close()


if mode == "save":
    save(*rest)
else:
    timed(load)
