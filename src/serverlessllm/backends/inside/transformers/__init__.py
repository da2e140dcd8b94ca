"""The transformers engine: `preload` once in a template process, `main` in each fork of it.

`python -m serverlessllm.backends.inside.transformers ARGUMENT` does both in one process.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from serverlessllm.backends.transformers import ENVIRONMENT

_LIBRARIES = (
    "torch",
    "transformers",
    "transformers.generation.continuous_batching.continuous_api",
    "transformers.models.auto.modeling_auto",
    "transformers.utils.chat_template_utils",
    "tokenizers",
    "llguidance",
    "jinja2.sandbox",
    "serverlessllm.backends.inside.quantize.running",
    "serverlessllm.backends.inside.transformers.server",
)
FAILED_STATUS = 1
_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt2")
"""Whose code is imported ahead; another model's is imported when it starts."""


def preload() -> None:
    """Import all that an instance needs, and compute nothing: a thread of torch's would not
    survive the fork. Leaves one thread."""
    os.environ.update(ENVIRONMENT)
    for library in _LIBRARIES:
        importlib.import_module(library)
    for family in _FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("legacy")  # type: ignore[no-untyped-call] # 70 ms of regular expressions, made once


def main(argument: str) -> None:
    """Be an instance, as `EngineParameters` in JSON say, until SIGTERM. Does not return: the
    library's thread would keep the interpreter from ending, and nothing is left to be saved."""
    from serverlessllm.backends.inside.transformers.server import run

    status = FAILED_STATUS
    try:
        status = run(argument)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
