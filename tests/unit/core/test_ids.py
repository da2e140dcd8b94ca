import pytest
from hypothesis import given
from hypothesis import strategies as st

from serverlessllm.core.errors import InvalidModelName
from serverlessllm.core.ids import (
    is_hub_name,
    model_name,
    model_revision,
    parse_agent_id,
    parse_model_id,
)


@pytest.mark.parametrize(
    "text", ["smollm2", "org/name", "org/name@main", "a", "Qwen/Qwen2.5-0.5B-Instruct@v1.0", "a_b"]
)
def test_a_valid_name_comes_back_unchanged(text):
    assert parse_model_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a/b/c",
        "../etc",
        "a/../b",
        "a..b",
        "a/",
        "/a",
        "a b",
        "a\n",
        "a@",
        "@a",
        "a@b@c",
        ".a",
        "a.",
        "-a",
        "a" * 97,
        "modèle",
        "a\x00b",
        "a/b@../c",
        "a%2fb",
    ],
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(InvalidModelName) as refused:
        parse_model_id(text)
    assert refused.value.status == 400
    assert refused.value.param == "model"


@given(st.text(max_size=40))
def test_what_is_accepted_is_safe_as_a_path_and_a_key(text):
    try:
        model = parse_model_id(text)
    except InvalidModelName:
        return
    assert ".." not in model
    assert not model.startswith(("/", "."))
    assert model.isascii()
    assert model.isprintable()
    assert len(model.split("/")) <= 2


def test_the_parts_of_a_name():
    pinned = parse_model_id("org/name@v1")
    assert (model_name(pinned), model_revision(pinned)) == ("org/name", "v1")
    assert model_revision(parse_model_id("org/name")) is None
    assert is_hub_name(pinned)
    assert not is_hub_name(parse_model_id("smollm2"))


@pytest.mark.parametrize("text", ["", "-a", "a/b", "a.b", "a" * 64])
def test_an_agent_id_that_would_not_do_as_a_path_is_refused(text):
    with pytest.raises(ValueError, match="agent id"):
        parse_agent_id(text)
