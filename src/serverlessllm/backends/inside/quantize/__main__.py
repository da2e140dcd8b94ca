"""The quantising process: one request as its argument, one message a line as its answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from serverlessllm.backends.inside.quantize.messages import (
    Advanced,
    Failed,
    Message,
    QuantizeRequest,
    Report,
)
from serverlessllm.core.errors import SLLMError
from serverlessllm.core.parent import die_with


def main() -> None:
    """Quantise, and say how it went.

    Descriptor 1 is kept for the messages alone: what a library prints goes to stderr.
    """
    request = msgspec.json.decode(sys.argv[1], type=QuantizeRequest)
    die_with(request.parent)
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)

        def say(message: Message) -> None:
            answers.write(msgspec.json.encode(message) + b"\n")

        last = _answer(request, say)
        say(last)
    sys.exit(1 if isinstance(last, Failed) else 0)


def _answer(request: QuantizeRequest, say: Callable[[Message], None]) -> Report | Failed:
    try:
        return _run(request, say)
    except SLLMError as error:
        return Failed(message=error.message)
    except OSError as error:
        return Failed(message=f"{error.filename or request.work}: {error.strerror}")


def _run(request: QuantizeRequest, say: Callable[[Message], None]) -> Report:
    # Libraries of some seconds' import: only after the request is known to be one.
    from serverlessllm.backends.inside.quantize.evaluate import check_possible, evaluate
    from serverlessllm.backends.inside.quantize.folder import write_folder
    from serverlessllm.backends.inside.quantize.source import Source, choose, skeleton

    source = Source(Path(request.source))
    if request.evaluate:
        check_possible(source)
    model = skeleton(source)
    chosen, kept = choose(source, model)

    def on_bytes(done: int, total: int) -> None:
        say(Advanced(stage="quantising", done=done, total=total))

    folder = Path(request.work)
    report = write_folder(source, chosen, kept, request.scheme, folder, on_bytes)
    if not request.evaluate:
        return report
    say(Advanced(stage="evaluating", done=0, total=report.source_bytes))
    found = evaluate(source, type(model), chosen, request.scheme, folder)
    return msgspec.structs.replace(report, evaluation=found)


if __name__ == "__main__":
    main()
