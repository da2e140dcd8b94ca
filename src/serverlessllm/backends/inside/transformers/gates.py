"""Layers that wait for their bytes: a forward hook on each, gone after its first run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import torch

from serverlessllm.backends.inside.transformers.arrivals import Arrivals, Wait
from serverlessllm.backends.inside.transformers.mapping import Mapping


class Gates:
    """One gate a layer: embedding, each block, norm, head."""

    def __init__(self, model: torch.nn.Module, mapping: Mapping, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._lock = threading.Lock()
        self._closed: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self.waits: list[Wait] = []
        """In the order in which the layers first computed."""
        for name, module, whole in _layers(model):
            chunks = _chunks(module, whole, mapping, arrivals)
            if chunks:
                self._close(name, module, chunks)
        self._last = model.register_forward_hook(self._check, with_kwargs=True)

    def _close(self, name: str, module: torch.nn.Module, chunks: set[int]) -> None:
        def wait(_module: torch.nn.Module, _args: object) -> None:
            began_s = time.monotonic()
            self._arrivals.wait(chunks)
            self._open(name, began_s)

        self._closed[name] = module.register_forward_pre_hook(wait)

    def _open(self, name: str, began_s: float) -> None:
        with self._lock:
            handle = self._closed.pop(name, None)
            if handle is None:
                return
            handle.remove()
            now_s = time.monotonic()
            self.waits.append(Wait(layer=name, waited_s=now_s - began_s, computed_at_s=now_s))

    def _check(
        self,
        model: torch.nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> object:
        """A module whose weights were used past its own call has not waited for them: then the
        whole pass is made again, once all is here. It writes the same places of the cache."""
        self._last.remove()
        self._tell()
        if not self._closed:
            return output
        self._arrivals.wait_all()
        return model.forward(*args, **kwargs)

    def _tell(self) -> None:
        """A line in the instance's log: how the first pass went behind the load."""
        if self.waits:
            first, last = self.waits[0], self.waits[-1]
            late = sum(1 for at_s in self._arrivals.times_s.values() if at_s > first.computed_at_s)
            waited_s = sum(wait.waited_s for wait in self.waits)
            sys.stderr.write(
                f"the first pass began with {late} chunks to come: {first.layer} computed "
                f"{last.computed_at_s - first.computed_at_s:.3f} s before {last.layer}, "
                f"{waited_s:.3f} s of it waiting for bytes\n"
            )
            sys.stderr.flush()


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """Name, module, and whether it stands for all below it: blocks do, the rest for their own."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(block) for block in blocks):
            continue
        parent = name.rpartition(".")[0]
        if parent and isinstance(model.get_submodule(parent), torch.nn.ModuleList):
            blocks.append(f"{name}.")
            yield name, module, True
        elif next(module.parameters(recurse=False), None) is not None:
            yield name, module, False


def _chunks(module: torch.nn.Module, whole: bool, mapping: Mapping, arrivals: Arrivals) -> set[int]:
    tensors = [*module.parameters(recurse=whole), *module.buffers(recurse=whole)]
    spans = (mapping.span(tensor) for tensor in tensors)
    return {number for span in spans if span for number in arrivals.chunks(*span)}
