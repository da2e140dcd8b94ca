"""Writing the quantised folder: tensor by tensor, a block of rows in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from serverlessllm.backends.inside.quantize.messages import Report, TensorError
from serverlessllm.backends.inside.quantize.rounding import (
    LIBRARY,
    Rounded,
    library_config,
    library_scheme,
)
from serverlessllm.backends.inside.quantize.source import Source
from serverlessllm.checkpoint.index import Tensor
from serverlessllm.checkpoint.quantized import (
    Part,
    QuantizedTensor,
    SafetensorsFolder,
    Scheme,
    quantized,
)
from serverlessllm.core.units import MIB

_BLOCK_ELEMENTS = 2 * MIB
"""Rounded at once: some 100 MB of working memory, and a block stays in the last cache."""
_COPY_BYTES = 16 * MIB
_DIGITS = 6
"""Of a reported error: it is part of a checkpoint's identity, and the last digits of a sum may
differ from one machine to the next."""


def write_folder(
    source: Source,
    chosen: dict[str, Tensor],
    kept: list[str],
    scheme: Scheme,
    folder: Path,
    on_bytes: Callable[[int, int], None],
) -> Report:
    """Write `folder` in the form that `from_pretrained` reads; `on_bytes(done, total)` of the
    source. The same source gives the same bytes.

    Raises:
        CheckpointError: a weight cannot be quantised; names it.
        OutOfSpace: the disk has no room.
    """
    forms = {tensor.name: quantized(tensor, scheme) for tensor in chosen.values()}
    parts: list[Part] = []
    for tensor in source.layout.tensors:
        form = forms.get(tensor.name)
        plain = Part(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)
        parts.extend(form.parts if form else (plain,))
    total = sum(tensor.size_bytes for tensor in source.layout.tensors)
    losses: dict[str, tuple[float, float]] = {}
    with SafetensorsFolder(folder, parts, source.layout.aliases) as out:
        done = 0
        for tensor in source.layout.tensors:
            form = forms.get(tensor.name)
            if form is None:
                _copy(source, tensor, out)
            else:
                losses[tensor.name] = _quantize(source, tensor, form, scheme, out)
            done += tensor.size_bytes
            on_bytes(done, total)
        size_bytes = out.size_bytes
    _write_side_files(source, folder, library_config(scheme, kept))
    return _report(source, scheme, losses, size_bytes)


def _copy(source: Source, tensor: Tensor, out: SafetensorsFolder) -> None:
    for start in range(0, tensor.size_bytes, _COPY_BYTES):
        size = min(_COPY_BYTES, tensor.size_bytes - start)
        out.write(tensor.name, start, memoryview(source.read(tensor.offset + start, size)))


def _quantize(
    source: Source, tensor: Tensor, form: QuantizedTensor, scheme: Scheme, out: SafetensorsFolder
) -> tuple[float, float]:
    """Squares of what was lost, and of what there was."""
    words = library_scheme(scheme)
    rows, _ = tensor.shape
    weight_row, scale_row = form.weight.size_bytes // rows, form.scale.size_bytes // rows
    lost = held = 0.0
    for first, block in source.rows(tensor, _BLOCK_ELEMENTS):
        rounded = Rounded(block, words)
        out.write(form.weight.name, first * weight_row, _bytes(rounded.weight))
        out.write(form.scale.name, first * scale_row, _bytes(rounded.scale))
        if form.zero is not None and rounded.zero is not None:
            zero_row = form.zero.size_bytes // form.zero.shape[0]
            out.write(form.zero.name, first // 8 * zero_row, _bytes(rounded.zero))
        exact = block.double()
        held += float(exact.square().sum())
        lost += float(exact.sub_(rounded.restored).square_().sum())
    if form.shape is not None:
        out.write(form.shape.name, 0, _bytes(torch.tensor(tensor.shape)))
    return lost, held


def _bytes(tensor: torch.Tensor) -> memoryview:
    # A clone: a tensor of one element may be contiguous with any stride, which no view allows.
    flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _write_side_files(source: Source, folder: Path, config: dict[str, object]) -> None:
    for name, data in source.side_files.items():
        (folder / name).write_bytes(data)
    text = json.dumps(source.config | {"quantization_config": config}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _report(
    source: Source, scheme: Scheme, losses: dict[str, tuple[float, float]], size_bytes: int
) -> Report:
    worst = max(losses, key=lambda name: _relative(*losses[name]))
    lost = math.fsum(loss for loss, _ in losses.values())
    held = math.fsum(size for _, size in losses.values())
    return Report(
        scheme=scheme.name,
        group_size=scheme.group_size,
        library=LIBRARY,
        error=_relative(lost, held),
        worst=TensorError(name=worst, error=_relative(*losses[worst])),
        quantized=tuple(losses),
        kept=tuple(t.name for t in source.layout.tensors if t.name not in losses),
        source_bytes=sum(tensor.size_bytes for tensor in source.layout.tensors),
        tensor_bytes=size_bytes,
    )


def _relative(lost: float, held: float) -> float:
    return float(f"{math.sqrt(lost / held):.{_DIGITS}g}") if held else 0.0
