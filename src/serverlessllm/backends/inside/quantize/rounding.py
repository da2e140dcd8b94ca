"""Rounding a block of rows by the library, at the scale that loses least."""

from __future__ import annotations

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from compressed_tensors.quantization.utils import calculate_qparams

from serverlessllm.checkpoint.quantized import Scheme

LIBRARY = f"compressed-tensors {compressed_tensors.__version__}"

_CLIPS = (0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that are tried at 4 bits: cutting the largest weight off often costs
less than the coarser steps that keeping it needs. At 8 bits it never does."""


class Rounded:
    """A block of rows (16, 32, 48, … or the rest) as the library stores it, and as it reads it
    back."""

    def __init__(self, rows: torch.Tensor, scheme: QuantizationScheme) -> None:
        compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
        self.scale, zero = best_scale(rows, scheme)
        # Divided in 32 bits (in BF16 the quotient itself would be rounded), stored in the rows'.
        stored = compressor.compress(
            {
                "weight": rows.float(),
                "weight_scale": self.scale.float(),
                "weight_zero_point": zero,
            },
            scheme,
        )
        self.weight: torch.Tensor = stored.get("weight_packed", stored.get("weight"))
        self.zero: torch.Tensor | None = stored.get("weight_zero_point")
        self.restored: torch.Tensor = compressor.decompress(
            stored | {"weight_scale": self.scale}, scheme
        )["weight"]


def library_scheme(scheme: Scheme) -> QuantizationScheme:
    """Our scheme in the library's words."""
    grouped = scheme.group_size is not None
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=scheme.bits,
            type=QuantizationType.INT,
            symmetric=scheme.symmetric,
            strategy=QuantizationStrategy.GROUP if grouped else QuantizationStrategy.CHANNEL,
            group_size=scheme.group_size,
        ),
        # A row of 8-bit weights lies as the kernels read it; 4-bit ones are packed in words.
        format=(
            CompressionFormat.naive_quantized
            if scheme.bits == 8
            else CompressionFormat.pack_quantized
        ),
    )


def library_config(scheme: Scheme, kept: list[str]) -> dict[str, object]:
    """`quantization_config` of a `config.json`: every Linear but those of these names."""
    said = library_scheme(scheme)
    config = QuantizationConfig(
        config_groups={"group_0": said},
        format=str(said.format),
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=kept,
    )
    dumped: dict[str, object] = config.model_dump(mode="json")
    return dumped | {"version": compressed_tensors.__version__}


def best_scale(rows: torch.Tensor, scheme: QuantizationScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """For each group of each row: a scale, of the rows' own element type, and a zero point."""
    arguments = scheme.weights
    groups = rows.reshape(rows.shape[0], -1, arguments.group_size or rows.shape[1])
    low, high = groups.aminmax(dim=-1)
    scale, zero = calculate_qparams(low, high, arguments)
    if arguments.num_bits != 4:
        return scale, zero
    exact = groups.float()
    least = _loss(exact, scale, zero)
    for clip in _CLIPS:
        other_scale, other_zero = calculate_qparams(low * clip, high * clip, arguments)
        loss = _loss(exact, other_scale, other_zero)
        better = loss < least
        scale = torch.where(better, other_scale, scale)
        zero = torch.where(better, other_zero, zero)
        least = torch.where(better, loss, least)
    return scale, zero


def _loss(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Square of what rounding to 4 bits at this scale loses, for each group."""
    wide, shift = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    steps = (groups / wide).add_(shift).round_().clamp_(-8, 7)
    return steps.sub_(shift).mul_(wide).sub_(groups).square_().sum(dim=-1)
