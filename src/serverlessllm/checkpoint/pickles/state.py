"""From what a pickle made to the flat state dict of a model."""

from __future__ import annotations

from itertools import islice
from typing import Final

from serverlessllm.checkpoint.bounds import check_count, check_text
from serverlessllm.checkpoint.pickles.values import StateDict, Tensor, TensorView, Value
from serverlessllm.core.errors import UnsupportedCheckpoint

WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "module")
"""Keys that training programs put the model's tensors under, beside an optimizer's, say."""
_DEPTH_MAX: Final = 4


def state_dict_of(value: Value) -> StateDict:
    """The tensors of the dict that is the model; what is beside them and is no tensor is left out.

    Raises:
        UnsupportedCheckpoint: there is no such dict, it holds tensors in containers, or a tensor
            is under a number.
        CheckpointError: a tensor's name is none; or there are too many.
    """
    wrapped_in: list[str] = []
    while len(wrapped_in) < _DEPTH_MAX:
        if type(value) is not dict:
            raise UnsupportedCheckpoint("it is not a dict of tensors")
        wrapper = next((key for key in WRAPPERS if _leads_on(value.get(key))), None)
        if wrapper is None:
            return StateDict(tuple(_flatten(value)), tuple(wrapped_in))
        wrapped_in.append(wrapper)
        value = value[wrapper]
    raise UnsupportedCheckpoint(f"its tensors are wrapped in {'/'.join(wrapped_in)} and more")


def _leads_on(value: Value) -> bool:
    """Whether a wrapper's key is followed by a dict of tensors, or by another wrapper."""
    if type(value) is not dict:
        return False
    return any(type(item) is Tensor for item in value.values()) or any(
        type(value.get(key)) is dict for key in WRAPPERS
    )


def _flatten(state: dict[Value, Value]) -> list[TensorView]:
    views = []
    seen: set[int] = set()
    for name, value in state.items():
        if type(value) is not Tensor:
            _refuse_tensors_inside(name, value, seen)
            continue
        if type(name) is not str:
            raise UnsupportedCheckpoint(f"a tensor whose name is not text, but {_shown(name)}")
        check_text(name, "tensor name")
        views.append(
            TensorView(
                name,
                value.dtype,
                value.storage.key,
                value.storage.size_bytes,
                value.offset,
                value.shape,
                value.strides,
            )
        )
    check_count(len(views), "tensors")
    if not views:
        known = ", ".join(WRAPPERS)
        keys = ", ".join(map(_shown, islice(state, 5))) or "nothing"
        raise UnsupportedCheckpoint(f"no tensors at its top ({keys}), nor under one of {known}")
    return views


def _refuse_tensors_inside(name: Value, value: Value, seen: set[int]) -> None:
    """Leaving them out would lose weights. `seen`: each container is looked into once."""
    left = [value]
    while left:
        item = left.pop()
        if type(item) is Tensor:
            raise UnsupportedCheckpoint(
                f"{_shown(name)} holds tensors in a container: save a flat dict of tensors"
            )
        if not isinstance(item, dict | list | tuple) or id(item) in seen:
            continue
        seen.add(id(item))
        left.extend(item.values() if isinstance(item, dict) else item)


def _shown(key: Value) -> str:
    """A key of a dict, for a message. Digits stand for a number."""
    return ascii(key.decode(errors="replace") if isinstance(key, bytes) else key)[:200]
