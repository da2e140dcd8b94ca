"""`from_pretrained` of a folder: `tensors` as every loader here; `ready` says when a model could
answer its first request, for who measures from the process's start."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from bench.peers.timed import timed
from transformers import AutoModelForCausalLM, AutoTokenizer

mode, folder = sys.argv[1:]


def load() -> Mapping[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return dict(model.named_parameters())


if mode == "ready":
    AutoTokenizer.from_pretrained(folder)
    load()
    print("ready", flush=True)
else:
    timed(load)
