"""`/openapi.json` and `/docs` through the front door: complete, safe, and behind the key."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re

import pytest

from serverlessllm.orchestrator.rest.documents import described_paths
from serverlessllm.orchestrator.rest.routes import HOT_PATHS

KEY = "sk-test"
PAGES = ("/docs", "/docs/start.js", "/openapi.json")


@pytest.fixture
async def asked(cluster):
    """A front door that asks for a key."""
    return await cluster(agents=0, api_key_sha256=(hashlib.sha256(KEY.encode()).hexdigest(),))


def basic(password: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Basic {base64.b64encode(f'x:{password}'.encode()).decode()}"),)


def plain(path: str) -> str:
    """As Starlette writes it → as the document does."""
    return re.sub(r"\{(\w+):path\}", r"{\1}", path)


async def test_no_served_route_is_missing(cluster):
    c = await cluster(agents=0)
    assert c.front._routes is not None
    served = {(path, "post") for path in HOT_PATHS}
    for route in c.front._internal._server.config.app.routes:
        methods = {method.lower() for method in route.methods} - {"head"}
        served |= {(plain(route.path), method) for method in methods}
    below = []
    for route in c.front._routes._table.routes:
        if route.path.endswith("/"):
            below.append(route.path)
        else:
            methods = {method.lower() for method in route.methods} - {"head", "options"}
            served |= {(route.path, method) for method in methods}
    assert served <= described_paths()
    for path in set(below) - {"/docs/"}:
        assert any(one.startswith(path) for one, _ in described_paths()), path
    for path, method in described_paths() - served:
        assert any(path.startswith(prefix) for prefix in below), (path, method)


async def test_the_document_is_json_and_made_once(cluster):
    c = await cluster(agents=0)
    first, second = await c.ask("/openapi.json"), await c.ask("/openapi.json")
    assert first.status == 200
    assert first.body == second.body
    document = json.loads(first.body)
    assert document["openapi"] == "3.1.0"
    told = {(p, m) for p, operations in document["paths"].items() for m in operations}
    assert told == described_paths()
    assert document["paths"]["/livez"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/models"]["get"]


async def test_the_page_asks_nobody_else(cluster):
    c = await cluster(agents=0)
    page = await c.ask("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; ")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    scripts = re.findall(r'src="([^"]+)"', page.body.decode())
    assert len(scripts) == 2
    for script in scripts:
        answer = await c.ask(script)
        assert (answer.status, answer.headers["content-type"]) == (200, "text/javascript")
    packed = await c.ask(scripts[1], headers=(("accept-encoding", "gzip"),))
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == answer.body
    assert (await c.ask("/docs/../secret")).status == 404
    assert (await c.ask("/docs/LICENSE")).status == 404
    assert (await c.ask("/docs", method="POST")).status == 405


@pytest.mark.parametrize("path", PAGES)
async def test_a_browser_is_asked_for_the_key_as_a_password(asked, path):
    refused = await asked.ask(path)
    assert refused.status == 401
    assert refused.headers["www-authenticate"].startswith("Basic realm=")
    assert (await asked.ask(path, headers=basic("wrong"))).status == 401
    assert (await asked.ask(path, headers=(("authorization", "Basic !"),))).status == 401
    assert (await asked.ask(path, headers=basic(KEY))).status == 200
    assert (await asked.ask(path, headers=(("authorization", f"Bearer {KEY}"),))).status == 200


async def test_a_password_opens_nothing_else(asked):
    for path in ("/v1/models", "/api/models", "/metrics"):
        refused = await asked.ask(path, headers=basic(KEY))
        assert refused.status == 401
        assert refused.headers["www-authenticate"] == "Bearer"


async def test_what_a_path_does_not_take_names_what_it_does(cluster):
    c = await cluster(agents=0)
    for method, path, allow in (
        ("GET", "/v1/chat/completions", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("PUT", "/api/models", {"GET", "HEAD", "POST"}),
        ("OPTIONS", "/api/agents", {"GET", "HEAD"}),
        ("DELETE", "/v1/responses/x/input_items", {"GET", "HEAD"}),
    ):
        answer = await c.ask(path, method=method)
        assert (answer.status, set(answer.headers["allow"].split(", "))) == (405, allow)
