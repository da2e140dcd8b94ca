"""Starting and stopping: the system as its operator handles it."""

from __future__ import annotations

import os
import signal
import ssl

import openai
import pytest
import trustme
from tests.e2e.system import run

from serverlessllm.cli.client import Client
from serverlessllm.config.paths import derive
from serverlessllm.config.settings import Settings
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.testing.management import register
from serverlessllm.testing.processes import sllm
from serverlessllm.testing.waiting import eventually_blocking


@pytest.mark.parametrize("verb", ["serve", "orchestrator", "agent"])
def test_sigterm_ends_it_in_good_order(data_dir, verb):
    arguments = () if verb == "agent" else ("--port", "0")
    with sllm(verb, *arguments, data_dir=data_dir) as running:
        sockets = derive(Settings(data_dir=str(data_dir)), os.environ).runtime_dir
        assert sockets.is_dir()
        assert running.stop() == 0
    assert "Traceback" not in running.log.read_text()
    assert not sockets.exists()


def test_a_certificate_renewed_during_a_drain_ends_nothing(data_dir):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    files = {name: str(data_dir / f"{name}.pem") for name in ("ca", "certificate", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    issued.cert_chain_pems[0].write_to_path(files["certificate"])
    issued.private_key_pem.write_to_path(files["key"])
    trusted = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=files["ca"]))
    chosen = [f"--set=orchestrator.tls_{name}={files[name]}" for name in ("certificate", "key")]
    with (
        sllm("serve", "--port", "0", *chosen, data_dir=data_dir) as running,
        openai.OpenAI(
            base_url=f"{running.address}/v1", api_key="unused", timeout=60, http_client=trusted
        ) as client,
    ):
        options = {"tokens": "1000", "token_s": "1"}
        spec = ModelSpec(model=ModelId("slow"), backend="fake", options=options)
        Client(running.address, None, files["ca"]).post("/api/models", spec, object)
        with client.chat.completions.create(
            model="slow", messages=[{"role": "user", "content": "Go."}], stream=True
        ) as stream:
            next(iter(stream))
            os.kill(running.pid, signal.SIGTERM)
            eventually_blocking(lambda: "draining" in running.log.read_text())
            os.kill(running.pid, signal.SIGHUP)
            eventually_blocking(lambda: "certificate reloaded" in running.log.read_text())
            assert running.alive
        assert running.wait() == 0


def test_a_second_ctrl_c_does_not_wait_for_answers(data_dir):
    with (
        sllm("serve", "--port", "0", data_dir=data_dir) as running,
        openai.OpenAI(base_url=f"{running.address}/v1", api_key="unused", timeout=60) as client,
    ):
        options = {"tokens": "1000", "token_s": "1"}
        register(running.address, model="slow", backend="fake", options=options)
        with client.chat.completions.create(
            model="slow", messages=[{"role": "user", "content": "Go."}], stream=True
        ) as stream:
            next(iter(stream))
            os.kill(running.pid, signal.SIGINT)
            eventually_blocking(lambda: "draining" in running.log.read_text())
            assert running.alive
            os.kill(running.pid, signal.SIGINT)
            assert running.wait() == 130


def test_a_port_that_is_taken_names_the_cure(server, data_dir):
    port = server.url.rpartition(":")[2]
    done = run("serve", "--port", port, "--data-dir", str(data_dir))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "--port 0" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["serve", "agent"])
def test_a_second_one_on_the_same_data_directory_names_the_cure(server, verb):
    arguments = () if verb == "agent" else ("--port", "0")
    done = run(verb, *arguments, "--data-dir", str(server.data_dir))
    assert done.returncode == 1
    assert "runs on this machine already" in done.stderr
    assert "agent.id=NAME" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_restart_finds_what_it_had(data_dir, weights):
    with sllm("serve", "--port", "0", data_dir=data_dir) as running:
        register(running.address, model="tiny", source=weights.as_uri(), backend="llamacpp")
        assert run("load", "tiny", url=running.address).returncode == 0
    with sllm("serve", "--port", "0", data_dir=data_dir) as running:
        loaded = run("load", "tiny", url=running.address)
        assert loaded.returncode == 0, loaded.stderr
        assert "(0 B moved" in loaded.stdout
