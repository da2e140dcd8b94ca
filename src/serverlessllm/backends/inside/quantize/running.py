"""Running quantised weights where they lie.

Left alone, the library restores the whole model to full precision at its first forward pass: a
private copy of twice to four times the checkpoint, that has to be made before the first token. On
a CPU torch has kernels that read 8- and 4-bit weights themselves, and a token is bound by the
bytes that it reads: one row takes a third of the time of BF16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from compressed_tensors.compressors import decompress_module
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from serverlessllm.checkpoint.quantized import has_kernel

_KERNEL_ROWS = 8
"""Up to here the 8-bit kernel is faster than restoring the weights and multiplying (measured at
576 to 4,096 columns: half the time at 4 rows, 4/3 of it at 16)."""

# The underscores are the names that torch gives them.
_INT8 = torch.ops.aten._weight_int8pack_mm  # noqa: SLF001
_INT4 = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001
_PACK = torch.ops.aten._convert_weight_to_int4pack_for_cpu  # noqa: SLF001

Forward = Callable[[torch.Tensor], torch.Tensor]


def run_in_place(model: nn.Module) -> None:
    """Let each quantised `Linear` of a model that the library has built compute by itself, from
    its first call on; until then its tensors are not looked at, so they may still be arriving.

    What no kernel reads (another element type than BF16, 8 bits in groups) is restored module by
    module, at its first call. Models that are not quantised are left as they are, and so is any
    that is not on a CPU.
    """
    modules = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme")
    ]
    if not modules or any(_scale(module).device.type != "cpu" for module in modules):
        return
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:  # the library's: restores everything at the first forward pass
        hook.remove()
        del model.ct_decompress_hook
    for module in modules:
        _become(module, _at_first_call(module))


def _at_first_call(module: nn.Linear) -> Forward:
    def forward(rows: torch.Tensor) -> torch.Tensor:
        prepared = _prepare(module)
        _become(module, prepared)
        return prepared(rows)

    return forward


def _become(module: nn.Linear, forward: Forward) -> None:
    """As the library itself does: the instance's own method, so that hooks still run."""
    module.__dict__["forward"] = forward


def _prepare(module: nn.Linear) -> Forward:
    """How this module computes, now that its tensors are here."""
    scheme = module.quantization_scheme
    assert isinstance(scheme, QuantizationScheme)
    scale, bits, grain = _scale(module), scheme.weights.num_bits, scheme.weights.group_size
    if scheme.input_activations is None and scale.dtype is torch.bfloat16:
        packed = bits == 4 and hasattr(module, "weight_packed")
        if packed and has_kernel(4, len(scale), module.in_features, grain):
            return _with_bias(module, _int4(module, grain))
        plain = bits == 8 and scheme.weights.symmetric and hasattr(module, "weight")
        if plain and has_kernel(8, len(scale), module.in_features, grain):
            return _with_bias(module, _int8(module))
    decompress_module(module, leave_decompressed=False)
    restored: Forward = type(module).forward.__get__(module)
    return restored


def _int8(module: nn.Module) -> Forward:
    weight, scale = _tensor(module, "weight"), _scale(module).view(-1)

    def forward(rows: torch.Tensor) -> torch.Tensor:
        if len(rows) <= _KERNEL_ROWS:
            result: torch.Tensor = _INT8(rows.contiguous(), weight, scale)
            return result
        # Whole numbers up to 128 are exact in BF16.
        return nn.functional.linear(rows, weight.to(rows.dtype)).mul_(scale)

    return forward


def _int4(module: nn.Module, group_size: int) -> Forward:
    """The kernel wants the words in an order of its own: a private copy, of the same size."""
    scale = _scale(module)
    shape = torch.Size(_tensor(module, "weight_shape").tolist())
    weight = unpack_from_int32(_tensor(module, "weight_packed"), 4, shape)
    packed = _PACK(weight.int() + 8, 1)
    zero = torch.zeros_like(scale)
    if hasattr(module, "weight_zero_point"):
        words = _tensor(module, "weight_zero_point")
        zero = unpack_from_int32(words, 4, scale.shape, packed_dim=0).to(scale.dtype).mul_(-scale)
    scales = torch.stack([scale.T, zero.T], dim=-1).contiguous()

    def forward(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = _INT4(rows.contiguous(), packed, group_size, scales)
        return result

    return forward


def _with_bias(module: nn.Module, multiply: Forward) -> Forward:
    bias = getattr(module, "bias", None)

    def forward(rows: torch.Tensor) -> torch.Tensor:
        flat = multiply(rows.reshape(-1, rows.shape[-1]))
        if bias is not None:
            flat = flat.add_(bias)
        return flat.view(*rows.shape[:-1], -1)

    return forward


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    found = getattr(module, name)
    assert isinstance(found, torch.Tensor)
    return found.detach()


def _scale(module: nn.Module) -> torch.Tensor:
    return _tensor(module, "weight_scale")
