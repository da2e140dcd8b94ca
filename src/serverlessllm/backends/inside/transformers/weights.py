"""The model, on weights that stay where they are: the library's own loading, given views."""

from __future__ import annotations

import json
from typing import cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from serverlessllm.backends.inside.quantize.running import run_in_place
from serverlessllm.backends.inside.transformers.arrivals import Arrivals, Wait
from serverlessllm.backends.inside.transformers.gates import Gates
from serverlessllm.backends.inside.transformers.mapping import Mapping
from serverlessllm.checkpoint.index import Index
from serverlessllm.core.errors import LoadFailed


class Weights:
    """The checkpoint's model, in evaluation mode, of the checkpoint's own element types.

    On a CPU every parameter is a view of the mapping, and nothing looks into it: the bytes may
    come later, and each layer waits for its own. A model whose tensors must be cast or joined is
    made of copies, once all is here.
    """

    def __init__(
        self, index: Index, mapping: Mapping, arrivals: Arrivals | None, device: str
    ) -> None:
        """Build it; `arrivals` is None when everything is here.

        Raises:
            LoadFailed: the library has no such model, or the tensors are not those it needs.
        """
        config = read_config(index, mapping.side_files())
        views = mapping.tensors()
        self._arrivals = arrivals
        if arrivals is not None and device != "cpu":
            arrivals.wait_all()
        self.model = _build(index, config, views, device)
        if arrivals is not None and not arrivals.complete and _looked(self.model, mapping, views):
            arrivals.wait_all()
            self.model = _build(index, config, views, device)
        self.model.requires_grad_(requires_grad=False)
        if index.quantization is not None:
            run_in_place(self.model)
        self._gates: Gates | None = None
        if arrivals is not None and not arrivals.complete:
            self._gates = Gates(self.model, mapping, arrivals)

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for, where its configuration says."""
        said = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return said if isinstance(said, int) and said > 0 else None

    @property
    def waits(self) -> list[Wait]:
        """How long each layer that was here late was waited for."""
        return [] if self._gates is None else list(self._gates.waits)

    @property
    def arrived_s(self) -> dict[int, float]:
        """When each chunk was heard of, on the machine's monotonic clock."""
        return {} if self._arrivals is None else self._arrivals.times_s

    def wait_all(self) -> None:
        """Return when everything is here: for who runs the model in another way than its own."""
        if self._arrivals is not None:
            self._arrivals.wait_all()


def read_config(index: Index, files: dict[str, bytes]) -> PreTrainedConfig:
    """What `config.json` says; code that it names was taken out by the converter.

    Raises:
        LoadFailed: it is not one of a model that the library has.
    """
    try:
        said = json.loads(files["config.json"])
        config_class = CONFIG_MAPPING[said["model_type"]]
        config: PreTrainedConfig = config_class.from_dict(said)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise LoadFailed(f"{index.model}: config.json: {type(error).__name__}: {error}") from error
    return config


def _build(
    index: Index, config: PreTrainedConfig, views: dict[str, torch.Tensor], device: str
) -> PreTrainedModel:
    """By `from_pretrained`, so renamed, joined and tied weights are as the library wants them."""
    model_class = getattr(transformers, index.architecture or "", None)
    if model_class is None:
        raise LoadFailed(f"the installed transformers has no {index.architecture!r}")
    model, missing = _load(model_class, config, views, device)
    aliases = {alias: views[name] for alias, name in index.aliases.items() if alias in missing}
    if aliases:  # bytes stored once for weights that this model does not tie
        model, missing = _load(model_class, config, views | aliases, device)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise LoadFailed(f"{index.model}: the checkpoint lacks {len(missing)} weights: {some} …")
    return model


def _load(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    views: dict[str, torch.Tensor],
    device: str,
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of its weights that nothing was given for."""
    try:
        with no_init_weights():  # else each layer draws random numbers, to be thrown away
            loaded = model_class.from_pretrained(
                None,
                config=config,
                state_dict=views,
                device_map=None if device == "cpu" else {"": device},
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        text = f"{type(error).__name__}: {error}"
        raise LoadFailed(f"transformers cannot build {model_class.__name__}: {text}") from error
    model, told = cast(tuple[PreTrainedModel, dict[str, list[str]]], loaded)
    return model, set(told["missing_keys"])


def _looked(model: PreTrainedModel, mapping: Mapping, views: dict[str, torch.Tensor]) -> bool:
    """Whether the loading has read bytes that may not have been there: then a parameter lies
    outside of the mapping, or a tensor was compared with another and dropped."""
    used = {parameter.data_ptr() for parameter in model.parameters()}
    used |= {buffer.data_ptr() for buffer in model.buffers()}
    copied = any(mapping.span(parameter) is None for parameter in model.parameters())
    return copied or any(view.data_ptr() not in used for view in views.values())
