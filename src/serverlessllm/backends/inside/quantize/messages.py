"""What the quantising process is asked, and the lines that it answers with. Imports no engine."""

from __future__ import annotations

import msgspec

from serverlessllm.checkpoint.quantized import Scheme


class QuantizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The process's one argument, as JSON."""

    source: str
    """A folder of raw weights of full precision, or one file of them."""
    work: str
    """An empty folder for the quantised ones."""
    parent: int
    """Process id of who asks: the process ends with it."""
    scheme: Scheme
    evaluate: bool = False
    """Compare the logits of both models too: needs memory for one of them."""


class Advanced(msgspec.Struct, frozen=True, kw_only=True, tag="advanced"):
    """So many bytes of the source are done."""

    stage: str
    """`quantising` or `evaluating`."""
    done: int
    total: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """It ended with an error that whoever asked can act on."""

    message: str


class TensorError(msgspec.Struct, frozen=True, kw_only=True):
    """How far one quantised weight is from the original."""

    name: str
    error: float
    """‖quantised − original‖ ÷ ‖original‖ (Frobenius)."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Next-token distributions of the quantised model beside the original's, on fixed prompts."""

    tokens: int
    """Positions compared."""
    kl_mean: float
    """Mean of KL(original ‖ quantised), in nats."""
    kl_max: float
    top1_agreement: float
    """Share of positions where both rank the same token first."""


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """The folder is written; what was done to which tensors."""

    scheme: str
    group_size: int | None
    library: str
    """Name and version."""
    error: float
    """‖quantised − original‖ ÷ ‖original‖ over all quantised weights."""
    worst: TensorError
    quantized: tuple[str, ...]
    """Names of the weights that were."""
    kept: tuple[str, ...]
    """Names of the tensors that are the source's own."""
    source_bytes: int
    """Of all tensors before."""
    tensor_bytes: int
    """Of all tensors after."""
    evaluation: Evaluation | None = None


Message = Advanced | Failed | Report
