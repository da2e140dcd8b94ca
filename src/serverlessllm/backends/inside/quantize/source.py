"""What is to be quantised: a source's tensors, and which of them are weights of its layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from serverlessllm.checkpoint.convert import plan_layout
from serverlessllm.checkpoint.index import KIND_TENSORS, Tensor
from serverlessllm.checkpoint.layout import Layout
from serverlessllm.checkpoint.order import Phase, place
from serverlessllm.checkpoint.sources.base import open_file, open_folder
from serverlessllm.core.errors import CheckpointError, UnsupportedCheckpoint

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ROWS_MIN = 16
"""The library cannot read the packed zero points of 8 rows or less; nor would that save much."""
_CONFIG = "config.json"


class Source:
    """Raw weights of full precision, read where they lie.

    Raises:
        UnsupportedCheckpoint: they are quantised already, are no whole model, or are of an
            architecture that transformers does not have; says the way out.
        CheckpointError: they are not valid.
    """

    def __init__(self, path: Path) -> None:
        opened = open_folder if path.is_dir() else open_file
        self.layout: Layout = plan_layout(opened(path, model="source"))
        if self.layout.kind != KIND_TENSORS:
            raise UnsupportedCheckpoint(
                "a GGUF has its own types of weights and is not quantised again: convert it as it "
                "is, or quantise the model's safetensors"
            )
        if self.layout.base is not None:
            raise UnsupportedCheckpoint(
                "this is an adapter, not a model: quantise its base, and keep the adapter as it is"
            )
        self.side_files = {
            file.name: self.read(file.offset, file.size_bytes) for file in self.layout.side_files
        }
        self.config = self._read_config()

    def read(self, offset: int, size_bytes: int) -> bytearray:
        """Bytes at `offset` of what would be the source's own `.bin`."""
        data = bytearray(size_bytes)
        self.layout.read_into(offset, memoryview(data))
        return data

    def rows(self, tensor: Tensor, elements: int) -> Iterator[tuple[int, torch.Tensor]]:
        """A matrix in blocks of whole rows, a multiple of 16 but for the last, of about `elements`,
        each with its first row's number.

        Raises:
            CheckpointError: a number in it is infinite or not a number.
        """
        count, columns = tensor.shape
        row_bytes = tensor.size_bytes // count
        step = max(ROWS_MIN, elements // columns // ROWS_MIN * ROWS_MIN)
        firsts = range(0, max(1, count - ROWS_MIN + 1), step)  # the last takes a short rest too
        for first in firsts:
            held = (count if first == firsts[-1] else first + step) - first
            data = self.read(tensor.offset + first * row_bytes, held * row_bytes)
            block = torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(held, columns)
            if not torch.isfinite(block).all():
                raise CheckpointError(
                    f"tensor {tensor.name!r} holds numbers that are infinite or not numbers"
                )
            yield first, block

    def model_config(self) -> PreTrainedConfig:
        """`config.json` as transformers has it: a new one each time, for models change theirs."""
        config_class = CONFIG_MAPPING[str(self.config.get("model_type"))]
        config: PreTrainedConfig = config_class.from_dict(self.config)
        return config

    def _read_config(self) -> dict[str, object]:
        if _CONFIG not in self.side_files:
            raise UnsupportedCheckpoint(
                "the source has no config.json, so nothing says which tensors are weights of layers"
            )
        config: dict[str, object] = json.loads(self.side_files[_CONFIG])
        said = config.get("quantization_config")
        if said:
            method = said.get("quant_method") if isinstance(said, dict) else None
            raise UnsupportedCheckpoint(
                f"the source is quantised already ({method or 'its config.json says so'}): "
                "convert it without --quantize, or take the original"
            )
        return config


def skeleton(source: Source) -> PreTrainedModel:
    """The model on the meta device: its modules and names, no weights.

    Raises:
        UnsupportedCheckpoint: transformers has no such architecture.
    """
    architecture = source.layout.architecture or ""
    model_class = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise UnsupportedCheckpoint(
            f"the installed transformers has no {architecture[:80]!r}, and code that comes with a "
            "checkpoint is never run"
        )
    try:
        with torch.device("meta"):
            return model_class(source.model_config())
    except Exception as error:  # a boundary: a stranger's numbers in another's constructor
        raise UnsupportedCheckpoint(
            f"transformers cannot build a {architecture} from this config.json: "
            f"{type(error).__name__}: {error}"[:500]
        ) from error


def choose(source: Source, model: PreTrainedModel) -> tuple[dict[str, Tensor], list[str]]:
    """The weights to quantise, by name of their module, and the modules that are to stay.

    Those are the weights of `Linear` modules in numbered layers: no embedding, norm or head, and
    nothing of a few rows, such as what chooses among experts.

    Raises:
        UnsupportedCheckpoint: the model has none.
    """
    tensors = {tensor.name: tensor for tensor in source.layout.tensors}
    shared = set(source.layout.aliases.values())
    prefix = f"{model.base_model_prefix}."
    chosen: dict[str, Tensor] = {}
    kept: list[str] = []
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear:
            continue
        weight = f"{name}.weight"
        tensor = tensors.get(weight) or tensors.get(weight.removeprefix(prefix))
        in_layer = place(weight).phase is Phase.LAYER
        small = module.out_features < ROWS_MIN
        if tensor is None or not in_layer or small or tensor.name in shared:
            kept.append(name)
        else:
            chosen[name] = tensor
    if not chosen:
        raise UnsupportedCheckpoint(
            f"{type(model).__name__} has no Linear weights in its layers that could be quantised: "
            "convert it without --quantize"
        )
    return chosen, kept
