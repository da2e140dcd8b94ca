"""The command's surface: every verb explains itself, starts light, and fails in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from serverlessllm.cli.main import app

VERBS = (
    *("serve", "orchestrator", "agent", "demo", "run", "pull", "ls", "ps", "show", "load"),
    *("unload", "rm", "convert", "inspect", "verify", "explain", "doctor", "key"),
)
LISTINGS = ("ls", "ps", "show", "explain", "inspect", "doctor", "pull", "load", "convert")

HEAVY = {
    *("asyncio", "msgspec", "rich", "structlog", "uvloop", "httptools", "obstore", "starlette"),
    *("uvicorn", "huggingface_hub", "openai", "httpx", "prometheus_client", "xllamacpp"),
    *("sqlite3", "blake3", "http.client", "ssl", "pydantic", "numpy"),
}


def sllm(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell would; nothing of the caller's environment is taken over."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLLM_")}
    return subprocess.run(
        [sys.executable, "-m", "serverlessllm.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=clean | (env or {}),
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def test_help_names_every_verb_whole():
    shown = sllm("--help").stdout
    for verb in VERBS:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"  {verb} ")]
        assert not line.endswith("..."), line


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['sllm', '--help']\n"
        "from serverlessllm.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & HEAVY


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    done = CliRunner().invoke(app, [verb, "--help"], prog_name="sllm")
    assert done.exit_code == 0
    assert f"Usage: sllm {verb}" in done.stdout
    assert ("--json" in done.stdout) or verb not in LISTINGS


def test_version():
    from serverlessllm import __version__

    assert sllm("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "said", "cure"),
    [
        (("ls", "--url", "http://127.0.0.1:9"), "no server answers at", "sllm serve"),
        (("ls", "--url", "ftp://x"), "write http://host:port", ""),
        (("ls", "--url", "http://127.0.0.1:99999"), "write http://host:port", ""),
        (("serve", "--config", "/none.toml"), "no such configuration file", "sllm config example"),
        (("serve", "--set", "nonsense"), "write KEY=VALUE", ""),
        (("serve", "--set", "loader.x=1"), "is not a setting", "sllm config example"),
        (("config", "check", "--set", "orchestrator.listen=x"), "host:port", "sllm config example"),
        (("serve", "--port", "0", "--data-dir", "/proc/none"), "/proc/none: ", "--data-dir"),
        (("serve", "--host", "0.0.0.0", "--port", "0"), "--allow-remote", ""),
        (("agent", "--id", "a b"), "agent id", ""),
        (("inspect", "/none/at/all"), "no such folder or file", "--data-dir"),
        (("inspect", "unknown-model"), "no such model in the store of /", "sllm pull"),
        (("verify", "/"), "no checkpoint", "sllm convert"),
        (("convert", "/none.gguf", "/tmp/out"), "no such file or folder", ""),
        (("pull", "m", "--source", "/etc/passwd"), "not a URL", "did you mean file:///etc/passwd?"),
        (("pull", "m", "--source", "none"), "not a URL", "file:///"),
        (("unload", "m", "--to", "moon"), "write one of dram, nvme, store", ""),
        (("rm", "m", "--url", "http://127.0.0.1:9"), "nobody is here to confirm", "--yes"),
        (("run", "m", "--url", "http://127.0.0.1:9"), "standard input is empty", ""),
    ],
)
def test_a_failure_is_one_line_and_its_cure(tmp_path, arguments, said, cure):
    done = sllm(*arguments, env={"XDG_DATA_HOME": str(tmp_path), "HOME": str(tmp_path)})
    assert done.returncode in {1, 2}
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert cure in done.stderr


def test_a_conversion_that_fails_leaves_no_folder(tmp_path):
    (tmp_path / "text.gguf").write_text("not weights")
    done = sllm("convert", str(tmp_path / "text.gguf"), str(tmp_path / "out"))
    assert done.returncode == 1
    assert "not a GGUF file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_config_check_shows_values_and_who_set_them(tmp_path):
    (tmp_path / "c.toml").write_text('[loader]\ndram_budget_bytes = "1GiB"\n')
    done = sllm(
        *("config", "check", "--json", "--config", str(tmp_path / "c.toml")),
        *("--set", "orchestrator.retries_max=1"),
        env={"SLLM_AGENT__ID": "one"},
    )
    rows = {row["key"]: (row["value"], row["origin"]) for row in json.loads(done.stdout)}
    assert rows["loader.dram_budget_bytes"] == (str(2**30), str(tmp_path / "c.toml"))
    assert rows["orchestrator.retries_max"] == ("1", "command line")
    assert rows["agent.id"] == ("one", "SLLM_AGENT__ID")
    assert rows["edge.backlog"][1] == "default"
    table = sllm("config", "check", "--config", str(tmp_path / "c.toml")).stdout
    assert "loader.dram_budget_bytes" in table
