import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.ingest.hub import HubName, parse_hub_source


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf://org/name", HubName(repo="org/name", revision=None, file=None)),
        ("hf://org/name@main", HubName(repo="org/name", revision="main", file=None)),
        ("hf://o/n/a-Q4.gguf", HubName(repo="o/n", revision=None, file="a-Q4.gguf")),
        ("hf://o/n@v1.0/a.gguf", HubName(repo="o/n", revision="v1.0", file="a.gguf")),
    ],
)
def test_a_hub_source_comes_apart(source: str, name: HubName) -> None:
    assert parse_hub_source(source) == name


@pytest.mark.parametrize(
    "source",
    [
        "hf://name",
        "hf://org/name/",
        "hf://org/name@",
        "hf://org/..",
        "hf://org/name/../../x",
        "hf://org/name/a/b.gguf",
        "hf://user:pass@host/name",
        "hf://org/name?x=1",
        "hf://org/na me",
        "hf://-org/name",
        "hf://org/" + "x" * 200,
    ],
)
def test_what_is_no_hub_source_is_refused(source: str) -> None:
    with pytest.raises(InvalidRequest, match="hf://org/name"):
        parse_hub_source(source)


@given(st.text(max_size=60))
def test_nothing_else_gets_out_of_the_parser(text: str) -> None:
    try:
        name = parse_hub_source("hf://" + text)
    except InvalidRequest:
        return
    assert ".." not in name.repo
    assert name.repo.count("/") == 1
