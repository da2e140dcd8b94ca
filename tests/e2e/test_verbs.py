"""Each verb against a running server: what people read, what scripts read, how it fails."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from tests.e2e.conftest import Server
from tests.e2e.system import run


def ok(server: Server, *arguments: str, stdin: str = "") -> str:
    done = run(*arguments, url=server.url, stdin=stdin)
    assert done.returncode == 0, done.stderr + server.log.read_text()[-4000:]
    return done.stdout


def test_ls(server):
    rows = {row["model"]: row for row in json.loads(ok(server, "ls", "--json"))}
    assert {"tiny", "fake"} <= rows.keys()
    table = ok(server, "ls")
    assert re.search(r"^fake +- +\S+ +fake +-$", table, re.MULTILINE)
    assert all(line == line.rstrip() for line in table.splitlines())


def test_a_models_life(server):
    ok(server, "pull", "tiny")
    shown = json.loads(ok(server, "show", "tiny", "--json"))
    assert shown["checkpoint"]["size_bytes"] > 100_000

    assert "ready" in ok(server, "load", "tiny", "--keep-alive", "5m")
    (agent,) = json.loads(ok(server, "ps", "--json"))
    (tiny,) = [m for m in agent["record"]["models"] if m["model"] == "tiny"]
    assert (tiny["state"], tiny["cache_level"]) == ("ready", 0)
    assert re.search(r"^tiny .* device .* ready ", ok(server, "ps"), re.MULTILINE)

    text = ok(server, "show", "tiny")
    assert "last load:" in text
    assert re.search(r"^start ", text, re.MULTILINE)

    assert "unloaded to dram" in ok(server, "unload", "tiny")
    assert "unloaded to store" in ok(server, "unload", "tiny", "--to", "store")


def test_load_says_json_lines(server):
    lines = [json.loads(line) for line in ok(server, "load", "fake", "--json").splitlines()]
    assert lines[-1]["state"] == "ready"


def test_pull_of_what_is_there_is_done_at_once(server):
    ok(server, "pull", "tiny")
    lines = [json.loads(line) for line in ok(server, "pull", "tiny", "--json").splitlines()]
    assert lines[-1]["stage"] == "done"


def test_pull_with_a_source_registers(server, weights):
    ok(server, "pull", "team/other", "--source", weights.as_uri(), "--backend", "llamacpp")
    assert "team/other" in ok(server, "ls")
    assert "checkpoint" in ok(server, "show", "team/other")
    assert "deleted" in ok(server, "rm", "team/other", "--yes")
    assert "team/other" not in ok(server, "ls")


def test_explain(server):
    answer = json.loads(ok(server, "explain", "fake", "--json"))
    assert answer["chosen"] == answer["rows"][0]["agent"]
    assert answer["chosen"] in ok(server, "explain", "fake")


@pytest.mark.parametrize("how", ["argument", "stdin", "alias"])
def test_run_streams_an_answer(server, how):
    name = "t" if how == "alias" else "tiny"
    arguments = ("run", name, "--max-tokens", "8")
    if how == "stdin":
        assert ok(server, *arguments, stdin="Say something.").strip()
    else:
        assert ok(server, *arguments, "Say", "something.").strip()


def test_inspect_and_verify_find_a_model_by_its_name(server):
    ok(server, "pull", "tiny")
    where = ("--data-dir", str(server.data_dir))
    text = ok(server, "inspect", "tiny", "--tensors", "--digests", *where)
    assert "blk.0.attn_q.weight" in text
    index = json.loads(ok(server, "inspect", "tiny", "--json", *where))
    assert index["chunks"][0]["blake3"] in text
    assert "verified" in ok(server, "verify", "tiny", *where)
    assert json.loads(ok(server, "verify", "tiny", "--json", *where))["size_bytes"] > 0


def test_doctor_sees_the_server(server):
    done = run("doctor", "--json", "--data-dir", str(server.data_dir), url=server.url)
    assert done.returncode == 0, done.stdout
    findings = {row["name"]: row for row in json.loads(done.stdout)}
    assert findings["server"]["health"] == "ok"
    assert findings["backend llamacpp"]["health"] == "ok"
    assert "agents registered" in findings["metadata"]["text"]
    assert all(row["fix"] for row in findings.values() if row["health"] == "fail")


@pytest.mark.parametrize(
    ("arguments", "said", "cure"),
    [
        (("show", "tinny"), "tinny", "did you mean tiny"),
        (("load", "tinny"), "tinny", "did you mean tiny"),
        (("unload", "tinny"), "tinny", "sllm ls"),
        (("explain", "tinny"), "tinny", "sllm ls"),
        (("rm", "tinny", "--yes"), "tinny", "sllm ls"),
        (("run", "tinny", "hello"), "tinny", "did you mean tiny"),
        (("load", "a b"), "not valid", ""),
        (("load", "fake", "--keep-alive", "soon"), "duration 'soon'", "5m"),
        (("pull", "x", "--source", "ftp://x"), "source 'ftp://x'", "hf://"),
        (("pull", "x", "--source", "file:///none.gguf"), "none.gguf", ""),
    ],
)
def test_a_refusal_is_one_line_and_its_cure(server, arguments, said, cure):
    done = run(*arguments, url=server.url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert cure in done.stderr


def test_a_server_that_is_something_else_is_said(server):
    done = run("ps", "--url", server.url + "/nowhere")
    assert done.returncode == 0  # only host and port count


def test_run_without_a_prompt_is_a_chat(server):
    terminal, theirs = pty.openpty()
    chat = subprocess.Popen(
        [sys.executable, "-m", "serverlessllm.cli.main", "run", "tiny", "--max-tokens", "4"],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"SLLM_URL": server.url, "TERM": "dumb"},
    )
    os.close(theirs)
    shown = ""

    def wait_for_prompts(count: int) -> None:
        nonlocal shown
        while shown.count(">>> ") < count:
            shown += os.read(terminal, 4096).decode(errors="replace")

    try:
        wait_for_prompts(1)
        os.write(terminal, b"hello\n")
        wait_for_prompts(2)
        os.write(terminal, b"/bye\n")
        assert chat.wait(30) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(terminal)
    _, _, answer = shown.partition("hello\r\n")
    assert answer.partition(">>> ")[0].strip()
