"""The order an engine runs through a model, read from the names of its tensors.

Embedding, layers by number, norm, head: so that the first bytes of a `.bin` are the ones an
engine needs first. Only names decide, so the same model always gets the same order.
"""

from __future__ import annotations

import re
from enum import IntEnum

import msgspec


class Phase(IntEnum):
    """Where in a forward pass a tensor is needed."""

    EMBEDDING = 0
    LAYER = 1
    NORM = 2
    HEAD = 3


class Place(msgspec.Struct, frozen=True, order=True):
    """Sorts tensors of one model into execution order; equal places are one layer."""

    phase: Phase
    stack_rank: int = 0
    """Encoders (vision, audio, text) run before what reads their output."""
    stack: str = ""
    number: int = 0

    @property
    def name(self) -> str:
        """`embedding`, `model.layers.7`, `blk.7`, `norm` or `head`."""
        if self.phase is Phase.LAYER:
            return f"{self.stack}.{self.number}"
        return self.phase.name.lower()


_LAYER = re.compile(
    r"(?P<stack>(?:.*?\.)?(?:layers?|h|blocks?|blk|resblocks))\.(?P<number>\d{1,6})\."
)
_ENCODER = re.compile(r"vision|visual|audio|image|encoder|enc\b|^v\.|^a\.")
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|score|classifier|cls|pooler|qa_outputs|output)(?:\.|$)"
)
_EMBEDDING = re.compile(r"emb|wte|wpe|rope_freqs|rotary")
_NORM = re.compile(r"norm|ln_f|(?:^|\.)ln(?:_\w+)?\.")
_DIGITS = re.compile(r"(\d+)")


def place(name: str) -> Place:
    """Where the tensor of this name belongs."""
    layer = _LAYER.match(name)
    if layer:
        stack = layer["stack"]
        return Place(Phase.LAYER, 0 if _ENCODER.search(stack) else 1, stack, int(layer["number"]))
    if _HEAD.search(name):
        return Place(Phase.HEAD)
    if not _EMBEDDING.search(name) and _NORM.search(name):
        return Place(Phase.NORM)
    # Whatever no rule knows (projectors, masks) is better early than missing when it is needed.
    return Place(Phase.EMBEDDING)


def execution_key(name: str) -> tuple[Place, tuple[tuple[int, str], ...], str]:
    """Sort key: the place, then the name with its numbers compared as numbers."""
    parts = _DIGITS.split(name)
    natural = tuple((int(part[:18]), "") if i % 2 else (-1, part) for i, part in enumerate(parts))
    return place(name), natural, name
