"""Finding backends: lazily, and with a broken plugin reported instead of fatal."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from serverlessllm.backends.base import Node, Refusal
from serverlessllm.backends.registry import GROUP, Backends
from serverlessllm.core.ids import ModelId
from serverlessllm.core.models import ModelSpec

NODE = Node(cpus=1, dram_free_bytes=1 << 30)
MODEL = ModelId("m")


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=GROUP)


BROKEN = point("broken", "serverlessllm.backends.nowhere:Thing")
RAISING = point("raising", "serverlessllm.backends.openai:_free_port.nothing")
FAKE = point("fake", "serverlessllm.backends.fake:Fake")
OPENAI = point("openai", "serverlessllm.backends.openai:OpenAI")


def test_the_installed_ones_are_found() -> None:
    assert {"fake", "llamacpp", "openai"} <= set(Backends().usable)


def test_a_broken_plugin_is_reported_and_the_others_work() -> None:
    backends = Backends([BROKEN, RAISING, FAKE])
    assert backends.names == ("broken", "fake", "raising")
    assert backends.usable == ("fake",)
    problem = backends.problem("broken")
    assert problem is not None
    assert "serverlessllm.backends.nowhere:Thing" in problem.reason


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    class Explosive:
        name, value = "explosive", "x:y"

        def load(self) -> object:
            raise AssertionError("imported")

    assert Backends([Explosive()]).names == ("explosive",)  # type: ignore[list-item]  # a stand-in


def test_a_spec_gets_the_backend_it_names_or_a_reason() -> None:
    backends = Backends([FAKE, OPENAI])
    chosen = backends.choose(ModelSpec(model=MODEL, backend="fake"), None, NODE)
    assert not isinstance(chosen, Refusal)
    assert chosen[0].name == "fake"
    refused = backends.choose(ModelSpec(model=MODEL, backend="nope"), None, NODE)
    assert isinstance(refused, Refusal)
    assert "no such backend; there are: fake, openai" in refused.reason


def test_without_a_name_the_first_that_can_serve_is_taken() -> None:
    chosen = Backends([FAKE, BROKEN, OPENAI]).choose(
        ModelSpec(model=MODEL, url="http://127.0.0.1:1"), None, NODE
    )
    assert not isinstance(chosen, Refusal)
    assert chosen[0].name == "openai"


def test_if_none_can_serve_every_reason_is_given() -> None:
    refused = Backends([FAKE, BROKEN, OPENAI]).choose(ModelSpec(model=MODEL), None, NODE)
    assert isinstance(refused, Refusal)
    for name in ("fake:", "broken:", "openai:"):
        assert name in refused.reason


def test_without_any_backend() -> None:
    refused = Backends([]).choose(ModelSpec(model=MODEL), None, NODE)
    assert refused == Refusal(reason="no backend is installed")


@pytest.mark.parametrize("name", ["fake", "llamacpp", "openai"])
def test_each_refuses_an_unknown_option_by_name(name: str) -> None:
    spec = ModelSpec(model=MODEL, backend=name, options={"colour": "red"}, url=None)
    refused = Backends().choose(spec, None, NODE)
    assert isinstance(refused, Refusal)
