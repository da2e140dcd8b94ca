"""The backends of the table, each on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from serverlessllm.backends.base import Backend
from serverlessllm.backends.fake import Fake
from serverlessllm.backends.llamacpp import LlamaCpp
from serverlessllm.backends.openai import OpenAI
from serverlessllm.backends.transformers import Transformers
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.index import Index
from serverlessllm.checkpoint.sources.base import open_file, open_folder
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.testing.checkpoints import write_random_gguf, write_random_safetensors

BACKENDS = ("llamacpp", "transformers", "openai", "fake")
_MODEL = ModelId("contract/model")


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """A harness for `testing.contracts.backend.started`."""

    backend: Backend
    spec: ModelSpec
    index: Index | None = None
    model_path: Path | None = None
    index_path: Path | None = None
    refused: tuple[tuple[ModelSpec, Index | None], ...] = ()
    logprobs: bool = True
    embeddings: bool = True
    progress_a_token: int = 1

    @property
    def stats_backend(self) -> Backend:
        return self.backend

    @property
    def stats_path(self) -> str:
        return self.backend.stats_path or "/health"


def engine(name: str, folder: Path) -> Engine:
    """A backend's tiny model; its files are written to `folder`."""
    match name:
        case "llamacpp":
            return _converted(LlamaCpp(), folder, {"context": "4096", "threads": "1"})
        case "transformers":
            return _converted(Transformers(), folder, {"context": "4096", "threads": "1"})
        case "openai":
            return Engine(
                backend=OpenAI(), spec=ModelSpec(model=_MODEL, command=_llama_server(folder))
            )
        case "fake":
            return Engine(backend=Fake(), spec=ModelSpec(model=_MODEL, backend="fake"))
    raise ValueError(name)


def _converted(backend: Backend, folder: Path, options: dict[str, str]) -> Engine:
    if backend.name == "llamacpp":
        source = open_file(write_random_gguf(folder / "random.gguf"), model=_MODEL)
    else:
        source = open_folder(write_random_safetensors(folder / "hf", dtype="F32"), model=_MODEL)
    done = convert(source, folder)
    return Engine(
        backend=backend,
        spec=ModelSpec(model=_MODEL, options=options),
        index=done.index,
        model_path=done.bin_path,
        index_path=done.idx_path,
    )


def _llama_server(folder: Path) -> tuple[str, ...]:
    """llama.cpp's server as it is: somebody else's, which nothing is known of."""
    script = Path(sys.modules[LlamaCpp.__module__].__file__ or "").parent / "inside/llamacpp.py"
    parameters = {
        "socket": "${socket}",
        "model": "${model}",
        "model_path": str(write_random_gguf(folder / "random.gguf")),
        "chat_prologue": "",
        "context": 512,  # it answers to the end of it where a request does not say
        "slots": 4,
        "threads": 1,
        "gpu_layers": 0,
        "cache_type": "f16",
        "embeddings": True,
        "pooling": "mean",
        "rerank": False,
        "batch": 512,
        "repack": False,
        "warmup": False,
    }
    return (sys.executable, "-I", str(script), msgspec.json.encode(parameters).decode())
