"""Clients written for OpenAI, unchanged, each in its own environment and language."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from serverlessllm.testing.management import call, register
from serverlessllm.testing.processes import data_directory, sllm

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"
PYTHON = ROOT / ".venvs" / "clients" / "bin" / "python"
START_S = "2.5"
"""Longer than a client waits before its first retry, and than a stream stays silent."""


@pytest.fixture(scope="module")
def front(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("clients")
    with (
        data_directory(folder) as data_dir,
        sllm("serve", "--port", "0", data_dir=data_dir) as running,
    ):
        register(running.address, model="tiny", source=weights.as_uri(), backend="llamacpp")
        for name in ("cold-retried", "cold-streamed"):
            register(running.address, model=name, backend="fake", options={"start_s": START_S})
        yield running.address


@pytest.fixture
def seen(front):
    """Run a client's script; what it printed."""

    def run(script):
        for name in ("cold-retried", "cold-streamed"):
            call(front, "POST", "/api/unload", {"model": name, "force": True})
        path = next(CLIENTS.glob(f"*/{script}"))
        program = "node" if path.suffix == ".mjs" else str(PYTHON)
        done = subprocess.run(
            [program, str(path), front, "sk-unused"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def check_chats(seen):
    """What every client of the OpenAI API must have seen."""
    assert seen["chat"]["text"]
    assert 0 < seen["chat"]["tokens"] <= 8
    assert seen["stream"]["text"] == seen["chat"]["text"]
    assert seen["tools"]["name"] == "tell"
    assert seen["tools"]["arguments"]["answer"] in {"yes", "no"}
    assert seen["json_schema"]["answer"] in {"yes", "no"}
    one, two = seen["embeddings"]["sizes"]
    assert one == two > 0
    assert seen["retries"]["finish_reason"] in {"stop", "length"}
    assert seen["cold_start"]["text"]


def test_openai_for_node(seen):
    found = seen("openai_client.mjs")
    check_chats(found)
    assert found["stream"]["tokens"] == found["chat"]["tokens"]
    assert found["helper"]["text"] == found["chat"]["text"]
    assert found["tools"]["finish_reason"] == "tool_calls"
    assert found["streamed_tools"]["name"] == "tell"
    assert found["streamed_tools"]["arguments"]["answer"] in {"yes", "no"}
    assert found["embeddings"]["apart"] < 1e-6
    assert {"tiny", "cold-retried"} <= set(found["models"])
    assert found["unknown_model"] == {
        "kind": "NotFoundError",
        "code": "model_not_found",
        "status": 404,
    }
    assert found["responses"]["text"]
    assert found["responses"]["status"] in {"completed", "incomplete"}


def test_the_vercel_ai_sdk(seen):
    found = seen("ai_sdk.mjs")
    for provider in ("openai", "compatible"):
        check_chats(found[provider])
        assert found[provider]["streamed_tools"]["name"] == "tell"
    assert found["responses"]["text"]


def test_anthropic_for_node(seen):
    found = seen("anthropic_client.mjs")
    assert found["chat"]["text"]
    assert found["chat"]["stop_reason"] in {"max_tokens", "end_turn"}
    assert found["stream"] == found["chat"]
    assert found["tools"]["name"] == "tell"
    assert found["tools"]["stop_reason"] == "tool_use"
    assert found["count_tokens"] > 0
    assert found["unknown_model"] == {"kind": "NotFoundError", "status": 404}


def test_langchain(seen):
    check_chats(seen("langchain_client.py"))


def test_litellm(seen):
    found = seen("litellm_client.py")
    check_chats(found)
    assert found["unknown_model"] == {"status": 404}
