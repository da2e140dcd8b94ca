"""`sllm key`: keys made, listed and revoked in the data directory, server or no server."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from serverlessllm.cli.failure import Failure
from serverlessllm.cli.main import app

KEY = re.compile(r"sk-sllm-[A-Za-z0-9_-]{43}")


@pytest.fixture
def sllm(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        done = CliRunner().invoke(app, ["key", *arguments, "--data-dir", str(tmp_path / "data")])
        if isinstance(done.exception, Failure):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done

    return run


def test_a_key_is_printed_alone_once(sllm, tmp_path):
    made = sllm("create", "alice")
    text = made.stdout.strip()
    assert KEY.fullmatch(text)  # nothing else: KEY=$(sllm key create …)
    assert "not shown again" in made.stderr
    assert text not in sllm("list").stdout
    assert text not in sllm("list", "--json").stdout
    assert text.encode() not in (tmp_path / "data" / "metadata.db").read_bytes()
    assert (tmp_path / "data").stat().st_mode & 0o077 == 0


def test_a_key_is_what_the_options_say(sllm):
    sllm(
        *("create", "bot", "--scope", "inference", "--scope", "metrics", "--model", "org/*"),
        *("--model", "small", "--expires", "30d", "--requests-per-minute", "60"),
        *("--tokens-per-minute", "10000", "--requests-at-once", "4"),
    )
    (key,) = json.loads(sllm("list", "--json").stdout)
    assert key["scopes"] == ["inference", "metrics"]
    assert key["models"] == ["org/*", "small"]
    assert key["expires_s"] - key["created_s"] == pytest.approx(30 * 86400, abs=2)
    limits = [key[f"requests_{per}"] for per in ("per_minute", "at_once")]
    assert (*limits, key["tokens_per_minute"]) == (60, 4, 10000)
    table = sllm("list").stdout
    for shown in ("bot", "inference metrics", "org/* small", "good for", "60", "10000"):
        assert shown in table


def test_a_key_is_revoked_by_name_or_id(sllm):
    sllm("create", "alice")
    made = json.loads(sllm("create", "bob", "--json").stdout)
    assert "revoked" in sllm("revoke", "alice").stdout
    assert json.loads(sllm("revoke", made["id"], "--json").stdout)["revoked_s"] is not None
    states = {key["name"]: key["revoked_s"] for key in json.loads(sllm("list", "--json").stdout)}
    assert None not in states.values()
    with pytest.raises(Failure, match="no API key"):
        sllm("revoke", "alice")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "a/b"), "name"),
        (("create", "a", "--scope", "root"), "no such scope"),
        (("create", "a", "--model", "a b"), "models"),
        (("create", "a", "--expires", "soon"), "--expires"),
        (("create", "a", "--expires", "0"), "--expires"),
        (("create", "a", "--expires", "-1"), "--expires"),
        (("revoke", "key_none"), "no API key"),
    ],
)
def test_nonsense_is_refused_in_words(sllm, arguments, said):
    with pytest.raises(Failure, match=said):
        sllm(*arguments)


def test_a_name_is_taken_once(sllm):
    sllm("create", "alice")
    with pytest.raises(Failure, match="already"):
        sllm("create", "alice")
