"""The process of a llama.cpp instance; run as a script, with its parameters as one JSON argument.

On the path of every cold start, so it imports the engine and nothing else of ours: of the 0.3 s
from here to ready, 0.05 s are Python, the rest is llama.cpp reading the vocabulary and clearing
the KV cache (93 MiB model). `fit_params` (0.14 s) plans GPU memory that is not there, the warm-up
(0.5 s) does what the first request does anyway.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from types import SimpleNamespace

import xllamacpp


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
    params.embedding = asked.embeddings
    pooling = f"LLAMA_POOLING_TYPE_{asked.pooling}".upper()
    params.pooling_type = getattr(xllamacpp.llama_pooling_type, pooling)
    cache_type = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{asked.cache_type}".upper())
    params.cache_type_k = params.cache_type_v = cache_type
    return params


if __name__ == "__main__":
    main()
