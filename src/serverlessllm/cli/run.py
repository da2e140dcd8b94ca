"""`sllm run`: talk to a model from the shell."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    from serverlessllm.cli.client import Client

Message = dict[str, str]


def run(
    model: Annotated[str, typer.Argument(help="A registered model, or a hub's org/name.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to ask. Without it: a chat.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    url: options.Url = None,
) -> None:
    """Ask a model, or chat with it."""
    from serverlessllm.cli.client import connect

    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    text = " ".join(prompt or ())
    if not text and not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if not text:
            raise Failure("run: the prompt on standard input is empty", exit_status=2)
    client = connect(url)
    _prepare(client, model)
    if text:
        _answer(client, model, [*messages, {"role": "user", "content": text}], max_tokens)
        return
    _chat(client, model, messages, max_tokens)


def _prepare(client: Client, model: str) -> None:
    """Pull and load with bars, so that a cold model's first answer is not a silent wait."""
    from serverlessllm.cli.client import model_path
    from serverlessllm.cli.load import load_model
    from serverlessllm.cli.pull import pull_model
    from serverlessllm.core.ids import is_hub_name, parse_model_id
    from serverlessllm.orchestrator.rest.wire import ModelView

    try:
        client.get(model_path("/api/models", model), ModelView)
    except Failure as failure:
        if failure.code != "model_not_found" or not is_hub_name(parse_model_id(model)):
            raise
        pull_model(client, model, None, None)
    load_model(client, model)


def _chat(client: Client, model: str, messages: list[Message], max_tokens: int) -> None:
    """Turn by turn until end of input; Ctrl-C while it answers stops that answer only."""
    with suppress(ImportError):  # an interpreter built without it: no history, no arrow keys
        import readline  # noqa: F401 - its import gives them to `input`

    print(f"{model}: /bye or Ctrl-D ends, Ctrl-C stops an answer")
    while True:
        try:
            text = input(">>> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/bye or Ctrl-D ends)")
            continue
        if text in {"/bye", "/exit", "/quit"}:
            return
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        answer = _answer(client, model, messages, max_tokens)
        messages.append({"role": "assistant", "content": answer})


def _answer(client: Client, model: str, messages: list[Message], max_tokens: int) -> str:
    """Print the answer as it comes; what was said of it, also when it was stopped."""
    from serverlessllm.cli.client import chat_deltas

    body = {"model": model, "messages": messages, "stream": True, "max_tokens": max_tokens}
    said: list[str] = []
    lines = client.lines("/v1/chat/completions", body)
    try:
        for kind, text in chat_deltas(lines):
            if kind == "text":
                said.append(text)
                print(text, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    finally:
        lines.close()
        print()
    return "".join(said)
