"""The process of a llama.cpp instance; run as a script, with its parameters as one JSON argument.

On the path of every cold start, so it imports the engine and nothing else of ours: of the 0.3 s
from here to ready, 0.05 s are Python, the rest is llama.cpp reading the vocabulary and clearing
the KV cache (93 MiB model). `fit_params` (0.14 s) plans GPU memory that is not there, the warm-up
(0.5 s) does what the first request does anyway.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import xllamacpp

_TEMPLATE = b"tokenizer.chat_template"
_TOOLS_TEMPLATE = b"tokenizer.chat_template.tool_use"
_STRING = 8
"""GGUF's number of the type."""
_HEADER_BYTES_MAX = 64 << 20
_TEMPLATE_BYTES_MAX = 1 << 20


def main() -> None:
    """Load, listen, tell, and wait for the signal that ends us."""
    asked = SimpleNamespace(**json.loads(sys.argv[1]))
    server = xllamacpp.Server(parameters(asked))
    ready = os.environ.pop("SLLM_READY_FD", None)
    if ready is not None:
        os.write(int(ready), b"\n")
        os.close(int(ready))
    signal.pause()
    del server


def parameters(asked: SimpleNamespace) -> xllamacpp.CommonParams:
    """What `serverlessllm.backends.llamacpp` asked for, in llama.cpp's terms."""
    params = xllamacpp.CommonParams()
    params.model.path = asked.model_path
    params.model_alias = {asked.model}
    params.hostnames = [asked.socket]
    params.n_ctx = asked.context
    params.n_parallel = asked.slots
    params.kv_unified = True  # one request may have the whole context when the others are short
    # An embedding's input must fit one physical batch, so llama.cpp wants both batches equal.
    params.n_batch = asked.batch if asked.embeddings else max(2048, asked.batch)
    params.n_ubatch = asked.batch
    params.cpuparams.n_threads = asked.threads
    params.cpuparams_batch.n_threads = asked.threads
    params.n_threads_http = (
        asked.slots + 8
    )  # a kept connection holds one; probes and figures while all slots are busy
    params.n_gpu_layers = asked.gpu_layers
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
    params.no_extra_bufts = not asked.repack  # a repacked tensor is a private copy
    params.warmup = asked.warmup
    params.fit_params = False
    params.endpoint_metrics = True
    params.ui = False
    params.prefill_assistant = False  # `continue_final_message` asks for it, request by request
    params.embedding = asked.embeddings or asked.rerank
    pooling = f"LLAMA_POOLING_TYPE_{'rank' if asked.rerank else asked.pooling}".upper()
    params.pooling_type = getattr(xllamacpp.llama_pooling_type, pooling)
    cache_type = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{asked.cache_type}".upper())
    params.cache_type_k = params.cache_type_v = cache_type
    template = chat_template(asked.model_path)
    if template is not None and "tools" not in template:
        # The server says nothing of tools to a template that does not ask for them.
        params.chat_template = asked.chat_prologue + template
    return params


def chat_template(model_path: str) -> str | None:
    """The GGUF's own. Found by its key's bytes: to read all that comes before it, the vocabulary
    above all, would take longer than the server takes to start."""
    key = len(_TEMPLATE).to_bytes(8, "little") + _TEMPLATE + _STRING.to_bytes(4, "little")
    with (
        Path(model_path).open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as gguf,
    ):
        at = gguf.find(key, 0, _HEADER_BYTES_MAX)
        near = max(0, at - _TEMPLATE_BYTES_MAX), at + _TEMPLATE_BYTES_MAX
        if at < 0 or gguf.find(_TOOLS_TEMPLATE, *near) >= 0:
            return None  # with another one for tools, the server takes that
        start = at + len(key) + 8
        size = int.from_bytes(gguf[start - 8 : start], "little")
        return gguf[start : start + min(size, _TEMPLATE_BYTES_MAX)].decode("utf-8", "replace")


if __name__ == "__main__":
    main()
