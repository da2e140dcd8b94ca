"""The `openai` client against `sllm serve`, and against an orchestrator with two agents."""

import base64
import contextlib
import json

import openai
import pytest

from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.management import register
from serverlessllm.testing.processes import data_directory, sllm

CHAT = [{"role": "user", "content": "What is 2+2?"}]


@pytest.fixture(scope="module", params=["serve", "apart"])
def client(request, tmp_path_factory):
    parent = tmp_path_factory.mktemp("cluster")
    weights = parent / "tiny.gguf"
    write_random_gguf(weights)
    with contextlib.ExitStack() as stack:
        data_dir = stack.enter_context(data_directory(parent))
        if request.param == "serve":
            front = stack.enter_context(sllm("serve", "--port", "0", data_dir=data_dir))
        else:
            front = stack.enter_context(sllm("orchestrator", "--port", "0", data_dir=data_dir))
            for name in ("one", "two"):
                stack.enter_context(sllm("agent", "--id", name, data_dir=data_dir, name=name))
        register(front.address, model="tiny", source=weights.as_uri(), aliases=["small"])
        yield stack.enter_context(
            openai.OpenAI(
                base_url=f"{front.address}/v1",
                api_key="unused",
                timeout=60,
                _strict_response_validation=True,
            )
        )


def test_chat(client):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=8)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in {"length", "stop"}
    assert answer.usage.completion_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat_is_the_same_answer(client):
    asked = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.usage.completion_tokens for c in chunks if c.usage] == [whole.usage.completion_tokens]


def test_completions(client):
    answer = client.completions.create(model="tiny", prompt="One, two,", max_tokens=4)
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens <= 4


def test_embeddings(client):
    # Strictly, the client refuses the base64 that it asks for when nobody says otherwise.
    answer = client.embeddings.create(model="tiny", input=["one", "two"], encoding_format="float")
    assert [row.index for row in answer.data] == [0, 1]
    assert len(answer.data[0].embedding) == len(answer.data[1].embedding) > 0
    assert answer.data[0].embedding != answer.data[1].embedding


def test_the_list_of_models_and_one_of_them(client):
    listed = {model.id: model for model in client.models.list()}
    assert "tiny" in listed
    assert client.models.retrieve("tiny") == listed["tiny"]


def test_an_alias_serves_its_model(client):
    answer = client.chat.completions.create(model="small", messages=CHAT, max_tokens=2)
    assert answer.usage.completion_tokens > 0
    assert answer.model == "small"
    shown = client.models.retrieve("small")
    assert (shown.id, shown.root) == ("small", "tiny")


def test_embeddings_in_base64(client):
    raw = client.embeddings.with_raw_response.create(
        model="tiny", input="one", encoding_format="base64"
    )
    row = json.loads(raw.content)["data"][0]["embedding"]
    assert len(base64.b64decode(row, validate=True)) % 4 == 0


def test_an_unknown_model_is_404_and_names_the_known(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="nobody", messages=CHAT)
    assert refused.value.code == "model_not_found"
    assert "tiny" in refused.value.message


def test_every_answer_explains_itself(client):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=CHAT, max_tokens=1
    )
    assert raw.headers["x-request-id"]
    assert int(raw.headers["openai-processing-ms"]) >= 0
    stages = [stage.partition(";")[0].strip() for stage in raw.headers["server-timing"].split(",")]
    assert stages == ["queue", "place", "fetch", "read", "start", "ttft"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": CHAT, "n": 10_000}, "n"),
        ({"messages": CHAT, "extra_body": {"keep_alive": "soon"}}, "keep_alive"),
    ],
)
def test_bad_input_is_400_and_names_the_field(client, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", **fields)
    assert refused.value.param == param
    assert isinstance(refused.value.body, dict)
    assert set(refused.value.body) == {"message", "type", "param", "code"}
