"""The Run:ai model streamer, as its users call it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from bench.peers.timed import timed
from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found] # a peer's

(path,) = sys.argv[1:]


def load() -> Mapping[str, torch.Tensor]:
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        return dict(streamer.get_tensors())


timed(load)
