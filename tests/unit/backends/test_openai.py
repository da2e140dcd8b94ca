"""The template of a foreign server's command, and what its URL may be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serverlessllm.backends.base import Launch, Node, Offer, Refusal
from serverlessllm.backends.openai import OpenAI
from serverlessllm.core.ids import InstanceId, ModelId
from serverlessllm.core.models import ModelSpec

NODE = Node(cpus=3, dram_free_bytes=1 << 30)
OPENAI = OpenAI()


def spec(*command: str, url: str | None = None, **options: str) -> ModelSpec:
    return ModelSpec(model=ModelId("org/m"), command=command, url=url, options=options)


def launch(model: ModelSpec, tmp_path: Path) -> Launch:
    return Launch(
        instance=InstanceId("i"),
        spec=model,
        index=None,
        model_path=Path("/dev/shm/m.bin"),
        index_path=Path("/dev/shm/m.idx"),
        run_dir=tmp_path,
        node=NODE,
        slots=5,
    )


def test_variables_are_filled_and_dollars_kept(tmp_path: Path) -> None:
    model = spec(
        "run", "--m=${model_path}", "${model}:${slots}/${cpus}", "$$HOME", "${socket}", "{x}"
    )
    plan = OPENAI.launch(launch(model, tmp_path))
    socket = f"{tmp_path}/backend.sock"
    assert plan.command == (
        "run",
        "--m=/dev/shm/m.bin",
        "org/m:5/3",
        "$HOME",
        socket,
        "{x}",
    )
    assert plan.address == f"unix:{socket}"
    assert plan.ready_path == "/health"


def test_a_port_is_free_and_the_address_follows(tmp_path: Path) -> None:
    plan = OPENAI.launch(launch(spec("run", "--port", "${port}"), tmp_path))
    assert plan.address == f"http://127.0.0.1:{plan.command[2]}"
    assert int(plan.command[2]) > 1024


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("run", "${sockets}"), r"unknown \$\{sockets\}"),
        (("run", "$socket"), r"\$\{name\}, or \$\$"),
        (("run", "${socket"), r"\$\{name\}, or \$\$"),
        (("run", "${}", "${socket}"), r"unknown \$\{\}"),
        (("run",), r"\$\{socket\} or \$\{port\}"),
        (("run", "${socket}", "${port}"), r"\$\{socket\} or \$\{port\}"),
        (("run", "${socket}", "${index_path}"), "needs a checkpoint"),
    ],
)
def test_a_wrong_template_is_refused_with_the_way_out(
    command: tuple[str, ...], reason: str
) -> None:
    refusal = OPENAI.can_serve(spec(*command), None, NODE)
    assert isinstance(refusal, Refusal)
    assert re.search(reason, refusal.reason)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://gpu1:8000/v1", "http://gpu1:8000"),
        ("http://gpu1/v1/", "http://gpu1:80"),
        ("http://[::1]:9", "http://[::1]:9"),
    ],
)
def test_a_url_is_somebody_elses_server(url: str, address: str, tmp_path: Path) -> None:
    model = spec(url=url, ready_path="/ping", slots="2")
    assert OPENAI.can_serve(model, None, NODE) == Offer(memory_bytes=0, slots=2)
    plan = OPENAI.launch(launch(model, tmp_path))
    assert plan.command == ()
    assert plan.address == address
    assert plan.ready_path == "/ping"
    assert plan.ready_timeout_s == 10.0


@pytest.mark.parametrize(
    "url", ["ftp://x", "https://x", "http://", "http://u@x", "http://x:99999", "http://x/a", "x"]
)
def test_a_wrong_url_is_refused(url: str) -> None:
    assert isinstance(OPENAI.can_serve(spec(url=url), None, NODE), Refusal)


@pytest.mark.parametrize(
    "options",
    [{"slots": "0"}, {"ready_path": "health"}, {"ready_timeout_s": "-1"}, {"memory_bytes": "1GB"}],
)
def test_wrong_options_are_refused_by_name(options: dict[str, str]) -> None:
    refusal = OPENAI.can_serve(spec(url="http://x", **options), None, NODE)
    assert isinstance(refusal, Refusal)
    assert next(iter(options)) in refusal.reason
