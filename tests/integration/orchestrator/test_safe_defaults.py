"""What is safe without anybody having thought of it: the defaults of the threat model, in one
place, on a real front door."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from serverlessllm.config.listen import parse_listen
from serverlessllm.config.paths import cluster_token, runtime_dir
from serverlessllm.config.settings import Settings
from serverlessllm.core.agentapi import TOKEN_HEADER
from serverlessllm.core.apikeys import NewApiKey, Scope
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.ids import Address, is_loopback
from serverlessllm.edge.settings import UpstreamSettings
from serverlessllm.edge.upstream import Upstreams
from serverlessllm.orchestrator.rest.routes import HOT_PATHS
from serverlessllm.telemetry.logs import configure_logging
from serverlessllm.telemetry.metrics import LABEL_SETS_MAX
from serverlessllm.telemetry.settings import LogFormat, LogLevel, TelemetrySettings
from serverlessllm.testing.cluster import TOKEN, running

OPEN = {"/livez", "/readyz"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SECRET_PROMPT = "the-prompt-that-nobody-may-log"


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {text}"),)


def served_paths(front) -> Iterator[tuple[str, Scope | None]]:
    """Every route of the real tables, as a path that it serves, and what it takes."""
    for path in HOT_PATHS:
        yield path, Scope.INFERENCE
    for route in front._routes._table.routes:
        yield route.path + ("x" if route.path.endswith("/") else ""), route.scope
    for route in front._internal._server.config.app.routes:
        yield re.sub(r"\{[^}]*\}", "x", route.path), Scope.ADMIN
    yield "/nothing/is/here", Scope.INFERENCE


async def test_it_listens_on_this_machine_only():
    settings = Settings()
    host = settings.orchestrator.listen.removeprefix("http://").rpartition(":")[0]
    assert is_loopback(host)
    assert settings.agent.listen is None  # a unix socket
    assert parse_listen(settings.orchestrator.listen) == settings.orchestrator.listen


@pytest.mark.parametrize("fields", [{}, {"require_key": False}])
async def test_it_is_not_served_to_others_without_a_key(cluster, fields):
    c = await cluster(agents=0, **fields)
    with pytest.raises(ValueError, match="sllm key create"):
        await c.another(fields).start(Address("http://0.0.0.0:0"))


@pytest.mark.parametrize(
    "fields",
    [{"require_key": True}, {"api_key_sha256": ["0" * 64]}, {"allow_public_without_key": True}],
)
async def test_it_is_served_to_others_when_that_was_said(cluster, fields):
    c = await cluster(agents=0, **fields)
    other = c.another(fields)
    address = await other.start(Address("http://0.0.0.0:0"))
    assert address.startswith("http://0.0.0.0:")
    await other.close()


async def test_a_key_that_was_made_is_enough_to_serve_others(cluster):
    c = await cluster(agents=0)
    await c.registry.create_api_key(NewApiKey(name="one"))
    other = c.another({})
    address = await other.start(Address("http://0.0.0.0:0"))
    assert address.startswith("http://0.0.0.0:")
    await other.close()


async def test_every_route_refuses_without_a_key_with_a_wrong_one_and_out_of_scope(cluster):
    c = await cluster(agents=0)
    texts = {}
    for scope in Scope:
        key, texts[scope] = await c.registry.create_api_key(
            NewApiKey(name=scope.value, scopes=(scope,))
        )
        await c.until(lambda key=key: key.sha256 in c.front.view.api_keys)
    paths = dict(served_paths(c.front))
    assert {"/v1/chat/completions", "/v1/models", "/metrics", "/api/models", "/api/keys"} <= set(
        paths
    )
    assert {path for path, scope in paths.items() if scope is None} == OPEN
    for path in paths:
        for method in METHODS:
            for headers in ((), bearer("sk-sllm-wrong"), bearer("")):
                answer = await c.ask(path, method=method, headers=headers)
                if path in OPEN:
                    assert answer.status in {200, 405}, (method, path)
                else:
                    assert answer.status == 401, (method, path)
    for path, wanted in paths.items():
        if wanted is None or path == "/nothing/is/here":
            continue
        for other, text in texts.items():
            answer = await c.ask(path, headers=bearer(text))
            opens = other is wanted or (wanted is Scope.METRICS and other is Scope.ADMIN)
            if opens:
                assert answer.status not in {401, 403}, (other, path)
            else:
                assert answer.status == 403, (other, path)
                assert f"lacks the scope {wanted}".encode() in answer.body  # in any dialect


async def test_odd_spellings_of_a_path_open_nothing(cluster):
    c = await cluster(agents=0, require_key=True)
    for path in (
        "/livez/../api/models", "/livez/", "//livez", "/livez;x", "/livez%2f..%2fapi%2fmodels",
        "/API/models", "/api//models", "/api/../api/models", "/./api/models", "/livez%00",
        "/x?/livez",
    ):  # fmt: skip
        assert (await c.ask(path)).status in {400, 401}, path
    answer = await c.ask("http://127.0.0.1/livez/../api/models")
    assert answer.status in {400, 401}


async def test_keys_are_stored_hashed_and_secrets_are_logged_nowhere(cluster, capfd):
    configure_logging(TelemetrySettings(log_level=LogLevel.DEBUG, log_format=LogFormat.JSON))
    try:
        c = await cluster()
        await c.warm("m")
        made = await c.ask("/api/keys", {"name": "boss", "scopes": ["admin", "inference"]})
        text = json.loads(made.body)["key"]
        body = {"model": "m", "messages": [{"role": "user", "content": SECRET_PROMPT}]}
        chat = "/v1/chat/completions"
        for asked in (body, {**body, "stream": True}, {**body, "n": -1}, {**body, "model": "none"}):
            for headers in (bearer(text), bearer(text + "x"), (("x-api-key", text),)):
                await c.ask(chat, asked, headers=(*headers, ("idempotency-key", "secret-key-1")))
        c.agents[0].die_before_head = True
        await c.ask(chat, body, headers=bearer(text))
        await c.ask(f"/v1/models/{text}", headers=bearer(text))
        await c.ask(
            f"/api/keys/{json.loads(made.body)['id']}", method="DELETE", headers=bearer(text)
        )
    finally:
        configure_logging(TelemetrySettings(log_level=LogLevel.WARNING))
    logged = "".join(capfd.readouterr())
    assert '"event":"request"' in logged.replace(" ", "")
    for secret in (text, SECRET_PROMPT, "secret-key-1", "cluster-token-of-the-test"):
        assert secret not in logged
    for file in c.directory.rglob("metadata.db*"):
        assert text.encode() not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_clients_mint_no_metric_labels(cluster):
    c = await cluster(on_demand_sources=("hf",))
    await c.warm("m")
    invented = "invented-by-a-client"
    for number in range(3):
        name = f"{invented}-{number}"
        for model in (name, f"{name}/model", f"m@{name}"):
            body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
            await c.ask("/v1/chat/completions", body, headers=(("x-sllm-wait", "0"),))
        await c.ask(f"/{name}")
        await c.ask("/v1/chat/completions", method=f"X{number}")
        await c.ask("/v1/models", headers=(("idempotency-key", name), ("x-request-id", name)))
    series = [
        line
        for line in (await c.ask("/metrics")).body.decode().splitlines()
        if line.startswith(("sllm_requests_total", "sllm_request_seconds"))
    ]
    assert series
    assert not [line for line in series if invented in line]
    assert LABEL_SETS_MAX <= 1000


async def test_media_is_not_fetched_for_a_client(cluster):
    c = await cluster()
    await c.warm("m")
    for url in ("http://127.0.0.1:1/x.png", "https://example.com/x.png", "file:///etc/passwd"):
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = await c.ask(
            "/v1/chat/completions",
            {"model": "m", "messages": [{"role": "user", "content": [part]}]},
        )
        assert answer.status == 400, url
    assert not c.agents[0].requests


async def test_a_client_cannot_have_a_checkpoints_code_run(cluster):
    c = await cluster(agents=0)
    for body in (
        {"model": "x", "trust_remote_code": True},
        {"model": "x", "source": "file:///etc", "command": ["sh"], "auto_map": {}},
    ):
        assert (await c.ask("/api/models", body)).status == 400
    source = Path(__file__).parents[3] / "src"
    said = [
        line.strip()
        for file in source.rglob("*.py")
        for line in file.read_text().splitlines()
        if "trust_remote_code" in line
    ]
    assert said
    assert all("trust_remote_code=False" in line for line in said)


async def test_commands_are_not_taken_from_other_machines(cluster):
    fields = {"listen": "http://0.0.0.0:0", "allow_public_without_key": True}
    c = await cluster(agents=0, **fields)
    answer = await c.ask("/api/models", {"model": "x", "backend": "openai", "command": ["true"]})
    assert (answer.status, answer.code) == (403, "forbidden")


async def test_parts_prove_themselves_with_the_clusters_token(tmp_path):
    async with running(agents=1) as system:
        (agent,) = (await system.registry.snapshot()).agents
        upstreams = Upstreams(UpstreamSettings(), SystemClock())
        try:
            for path in ("/status", "/metrics", "/load", "/v1/chat/completions"):
                for headers in ((), ((TOKEN_HEADER, "guess"),)):
                    async with upstreams.send(agent.address, "GET", path, headers) as response:
                        assert response.status == 401, path
            async with upstreams.send(
                agent.address, "GET", "/status", ((TOKEN_HEADER, TOKEN),)
            ) as response:
                assert response.status == 200
        finally:
            await upstreams.close()
    token = tmp_path / "cluster-token"
    assert len(cluster_token(token)) == 64
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    token.chmod(0o644)
    with pytest.raises(PermissionError):
        cluster_token(token)


def test_sockets_lie_where_nobody_else_comes(tmp_path):
    shared = tmp_path / "run"
    shared.mkdir(mode=0o755)
    with runtime_dir(shared):
        assert stat.S_IMODE(shared.stat().st_mode) == 0o700


async def test_no_page_of_another_origin_reads_or_sends_anything(cluster):
    c = await cluster(agents=0)
    for method in METHODS:
        for path in ("/v1/models", "/v1/chat/completions", "/api/models", "/livez"):
            asked = (
                ("origin", "https://evil.example"),
                ("access-control-request-method", "POST"),
                ("access-control-request-headers", "authorization"),
            )
            answer = await c.ask(path, method=method, headers=asked)
            assert answer.status == 403
            assert "access-control-allow-origin" not in answer.headers
    for path in ("/v1/models", "/v1/chat/completions", "/livez"):
        answer = await c.ask(path, method="OPTIONS")
        assert answer.status == 405
        assert "access-control-allow-origin" not in answer.headers


def test_a_configuration_shows_no_secret_and_makes_sense():
    from serverlessllm.orchestrator.settings import OrchestratorSettings

    for fields in (
        {"api_key_sha256": ("my-own-key",)},
        {"api_key_sha256": ("0" * 64,), "require_key": False},
        {"tls_certificate": "x"},
        {"tls_key": "x"},
    ):
        with pytest.raises(ValueError, match=r"^(?!.*my-own-key)"):
            msgspec.structs.replace(OrchestratorSettings(), **fields)
