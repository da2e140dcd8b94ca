"""Each verb against a running server: what people read, what scripts read, how it fails."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.e2e.conftest import Server
from tests.e2e.system import run

from serverlessllm.testing.management import register


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
    ok(server, "unload", "tiny", "--to", "store")  # another test may have loaded it
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
    assert "1 agent registered" in findings["metadata"]["text"]
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
        (("pull", "a b"), "not valid", ""),
        (("pull", "tinny"), "'tinny' does not exist", "did you mean tiny"),
        (("pull", "tiny", "--source", "hf://org/x"), "another source", "sllm rm"),
        (("pull", "x", "--source", "ftp://x"), "source 'ftp://x'", "hf://"),
        (("pull", "x", "--source", "file:///none.gguf"), "none.gguf", "look at the name and at"),
    ],
)
def test_a_refusal_is_one_line_and_its_cure(server, arguments, said, cure):
    done = run(*arguments, url=server.url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert cure in done.stderr


def test_only_host_and_port_of_a_url_count(server):
    assert run("ps", "--url", server.url + "/nowhere").returncode == 0


def test_a_server_of_another_kind_is_said():
    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        thread = threading.Thread(target=stranger.serve_forever)
        thread.start()
        try:
            done = run("ls", url=f"http://127.0.0.1:{stranger.server_port}")
        finally:
            stranger.shutdown()
            thread.join()
    assert done.returncode == 1
    assert "not as a ServerlessLLM server does" in done.stderr
    assert "--url and SLLM_URL" in done.stderr


def test_a_failed_pull_shows_in_the_listing(server):
    register(server.url, model="lost", source="file:///none.gguf")
    assert run("pull", "lost", url=server.url).returncode == 1
    try:
        assert re.search(r"^lost +- +failed ", ok(server, "ls"), re.MULTILINE)
        assert re.search(r"^ingest +failed: .*none\.gguf", ok(server, "show", "lost"), re.MULTILINE)
    finally:
        ok(server, "rm", "lost", "--yes")


def test_a_model_of_a_command_lies_nowhere_until_it_runs(server):
    command = ["my-server", "--uds", "${socket}"]
    register(server.url, model="absent", backend="openai", command=command)
    try:
        done = run("run", "absent", "hello", url=server.url)
        assert "'my-server' cannot be started" in done.stderr
        assert "logs/AGENT/" in done.stderr.splitlines()[-1]
        assert re.search(r"^absent +- +- +openai +my-server --uds", ok(server, "ls"), re.MULTILINE)
        shown = ok(server, "show", "absent")
        assert re.search(r"^command +my-server --uds", shown, re.MULTILINE)
        assert "checkpoint" not in shown
    finally:
        ok(server, "rm", "absent", "--yes")


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
        # One that comes between the prompt and the read is seen only when a line is there.
        while shown.count(">>> ") < 3:
            chat.send_signal(signal.SIGINT)
            while shown.count(">>> ") < 3 and select.select([terminal], [], [], 3.0)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        os.write(terminal, b"/bye\n")
        assert chat.wait(30) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(terminal)
    _, _, answer = shown.partition("hello\r\n")
    assert answer.partition(">>> ")[0].strip()
