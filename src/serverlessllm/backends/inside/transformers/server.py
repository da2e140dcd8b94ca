"""The engine's process: from its argument to an OpenAI server on a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import torch
import uvloop
from transformers.utils import logging

from serverlessllm.backends.base import READY_FD
from serverlessllm.backends.inside.transformers.api import Api
from serverlessllm.backends.inside.transformers.arrivals import Arrivals
from serverlessllm.backends.inside.transformers.asks import Defaults
from serverlessllm.backends.inside.transformers.generation import BatchLimits, Generator
from serverlessllm.backends.inside.transformers.mapping import Mapping
from serverlessllm.backends.inside.transformers.text import Text
from serverlessllm.backends.inside.transformers.weights import Weights
from serverlessllm.backends.transformers import EngineParameters
from serverlessllm.checkpoint.index import Index, decode_index
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.ids import Address
from serverlessllm.edge.server import EdgeServer
from serverlessllm.edge.settings import EdgeSettings
from serverlessllm.openai.errors import render_error

START_FAILED_STATUS = 1
ENGINE_FAILED_STATUS = 4


def run(argument: str) -> int:
    """Serve until SIGTERM; returns the process's exit status."""
    asked = msgspec.json.decode(argument, type=EngineParameters)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(asked.threads)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(asked, decode_index(Path(asked.index_path).read_bytes())))
    except SLLMError as error:
        sys.stderr.write(f"{error.message}\n")
        return START_FAILED_STATUS


async def _serve(asked: EngineParameters, index: Index) -> int:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    arrivals = Arrivals.of_environment(index)
    mapping = Mapping.of_environment(index, Path(asked.model_path))
    if arrivals is not None:
        for file in index.side_files:
            arrivals.wait(arrivals.chunks(file.offset, file.size_bytes))
    files = mapping.side_files()
    weights = Weights(index, mapping, arrivals, asked.device)
    limits = BatchLimits(
        context=asked.context, page=asked.page, batch=asked.batch, slots=asked.slots
    )
    said = _generation_config(files)
    generator = Generator(weights.model, limits, lambda: _end(ended, ENGINE_FAILED_STATUS))
    text = Text(files, Path(asked.run_dir))
    api = Api(
        model=asked.model,
        weights=weights,
        text=text,
        generator=generator,
        defaults=msgspec.convert(said, Defaults, strict=False),
        eos=_end_tokens(said, weights, text),
        context=min(asked.context, weights.positions or asked.context),
        embeddings=asked.embeddings,
    )
    server = EdgeServer(api.handle, EdgeSettings(), render_error, SystemClock())
    # Until here a SIGTERM ends the process as it does any other.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _end, ended, 0)
    await server.start(Address(f"unix:{asked.socket}"))
    _tell_ready()
    generator.start()  # its thread makes the cache while the first request is on its way
    gc.collect()
    gc.freeze()
    status = await ended
    await server.close()
    return status


def _end(ended: asyncio.Future[int], status: int) -> None:
    if not ended.done():
        ended.set_result(status)


def _tell_ready() -> None:
    ready = os.environ.pop(READY_FD, None)
    if ready is not None:
        with contextlib.suppress(BrokenPipeError):
            os.write(int(ready), b"\n")
        os.close(int(ready))


def _generation_config(files: dict[str, bytes]) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        said = json.loads(files.get("generation_config.json", b"{}"))
        if isinstance(said, dict):
            return said
    return {}


def _end_tokens(said: dict[str, object], weights: Weights, text: Text) -> frozenset[int]:
    """Tokens that end an answer, by whoever names one."""
    ends: set[int] = set() if text.eos_id is None else {text.eos_id}
    config = weights.model.config.get_text_config()
    for named in (said.get("eos_token_id"), getattr(config, "eos_token_id", None)):
        if isinstance(named, int):
            ends.add(named)
        elif isinstance(named, list):
            ends.update(one for one in named if isinstance(one, int))
    return frozenset(ends)
