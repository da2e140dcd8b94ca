"""What quantising does to the answers: both models' next-token distributions on fixed prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from serverlessllm.backends.inside.quantize.messages import Evaluation
from serverlessllm.backends.inside.quantize.rounding import Rounded, library_scheme
from serverlessllm.backends.inside.quantize.source import DTYPES, Source
from serverlessllm.checkpoint.index import Tensor
from serverlessllm.checkpoint.quantized import Scheme
from serverlessllm.core.errors import OutOfSpace, UnsupportedCheckpoint
from serverlessllm.core.units import MIB, format_size

_PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. Both cities",
    "Water freezes at zero degrees and boils at one hundred, because its molecules",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    return",
    "Q: What is 2 + 2?\nA: 4\n\nQ: What is 3 + 5?\nA:",
)
_SPARE_BYTES = 512 * MIB


def check_possible(source: Source) -> None:
    """Refuse what cannot be evaluated, before the work begins.

    Raises:
        OutOfSpace: the original does not fit into memory.
        UnsupportedCheckpoint: it has no tokenizer, or weights that are no floats.
    """
    if not any("token" in name or name.startswith("vocab") for name in source.side_files):
        raise UnsupportedCheckpoint("the source has no tokenizer: --evaluate reads prompts with it")
    odd = sorted({tensor.dtype for tensor in source.layout.tensors} - DTYPES.keys())
    if odd:
        raise UnsupportedCheckpoint(f"--evaluate cannot run weights of {odd[0]}")
    needed, free = source.layout.size_bytes + _SPARE_BYTES, _available_bytes()
    if needed > free:
        raise OutOfSpace(
            f"--evaluate needs {format_size(needed)} of memory for the original, and "
            f"{format_size(free)} are free: leave it out, or quantise on a larger machine"
        )


def evaluate(
    source: Source,
    model_class: type[PreTrainedModel],
    chosen: dict[str, Tensor],
    scheme: Scheme,
    folder: Path,
) -> Evaluation:
    """Run both models on the prompts, one after the other in the same memory.

    `folder` has the tokenizer. The quantised weights are those that the library restores.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in _PROMPTS]
    model = _original(source, model_class)
    before = list(_distributions(model, prompts))
    words = library_scheme(scheme)
    for name, tensor in chosen.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        for first, block in source.rows(tensor, 2 * MIB):
            weight.data[first : first + len(block)] = Rounded(block, words).restored
    after = list(_distributions(model, prompts))
    losses = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)])
    agree = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(before, after, strict=True)])
    return Evaluation(
        tokens=len(losses),
        kl_mean=float(losses.mean()),
        kl_max=float(losses.max()),
        top1_agreement=float(agree.double().mean()),
    )


def _original(source: Source, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """The model with weights of its own, which may be written to."""
    tensors = {
        tensor.name: torch.frombuffer(
            source.read(tensor.offset, tensor.size_bytes), dtype=DTYPES[tensor.dtype]
        ).view(tensor.shape)
        for tensor in source.layout.tensors
        if tensor.size_bytes
    }
    tensors |= {alias: tensors[name] for alias, name in source.layout.aliases.items()}
    model: PreTrainedModel = model_class.from_pretrained(
        None, config=source.model_config(), state_dict=tensors
    )
    return model


@torch.inference_mode()
def _distributions(model: PreTrainedModel, prompts: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Log-probabilities of every next token, of 64 bits, a row a position."""
    for prompt in prompts:
        yield model(prompt).logits[0].double().log_softmax(-1)


def _available_bytes() -> int:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * 4096
