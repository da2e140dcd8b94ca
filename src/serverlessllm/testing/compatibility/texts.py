"""What completions, embeddings and the other operations may say."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence

from serverlessllm.testing.compatibility.asking import Behaviour, Check, Client

_IDS = [1, 265, 266]
_TOKEN = 270


def _prompts(prompt: object, count: int) -> Check:
    async def check(client: Client) -> bool:
        answer = await client.complete(prompt=prompt, n=2, temperature=1, max_tokens=2)
        single = await client.complete(prompt=prompt, max_tokens=1)
        places = [choice["index"] for choice in answer["choices"]]
        usage, once = answer["usage"], single["usage"]["prompt_tokens"]
        counted = usage["completion_tokens"] == 4 * count and usage["prompt_tokens"] == once
        return places == list(range(2 * count)) and counted

    return check


async def _stream(client: Client) -> bool:
    chunks = await client.complete(stream=True, prompt=["one", "two"])
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    whole = (await client.complete(prompt=["one", "two"]))["choices"]
    return texts == [choice["text"] for choice in whole]


async def _default_length(client: Client) -> bool:
    answer = await client.complete(max_tokens=None)
    return bool(answer["usage"]["completion_tokens"] == 16)


async def _echo(client: Client) -> bool:
    plain = (await client.complete())["choices"][0]["text"]
    return bool((await client.complete(echo=True))["choices"][0]["text"] == "one two" + plain)


async def _echo_of_ids(client: Client) -> bool:
    text = (await client.complete(prompt=_IDS, echo=True))["choices"][0]["text"]
    return len(text) > len((await client.complete(prompt=_IDS))["choices"][0]["text"])


async def _scores(client: Client) -> bool:
    scores = (await client.complete(logprobs=2))["choices"][0]["logprobs"]
    return (
        len(scores["tokens"]) == 4
        and all(len(top) >= 2 for top in scores["top_logprobs"])
        and all(logprob <= 0 for logprob in scores["token_logprobs"])
    )


async def _scores_only(client: Client) -> bool:
    scores = (await client.complete(logprobs=0))["choices"][0]["logprobs"]
    return scores is not None and len(scores["token_logprobs"]) == 4


async def _echoed_scores(client: Client) -> bool:
    """Those of a prompt are those that its tokens had as an answer."""
    generated = (await client.complete(prompt=_IDS, logprobs=1))["choices"][0]["logprobs"]
    scored = await client.complete(prompt=_IDS, logprobs=1, echo=True)
    scores = scored["choices"][0]["logprobs"]
    if scores is None or len(scores["tokens"]) != len(_IDS) + 4:
        return False
    tail = scores["token_logprobs"][-4:]
    return all(map(_near, tail, generated["token_logprobs"])) and scores["token_logprobs"][1] < 0


async def _evaluation(client: Client) -> bool:
    answer = await client.complete(prompt=_IDS, logprobs=1, echo=True, max_tokens=0)
    scores = answer["choices"][0]["logprobs"]
    spent = answer["usage"]["completion_tokens"]
    return spent == 0 and scores is not None and len(scores["tokens"]) == len(_IDS)


async def _best_of(client: Client) -> bool:
    asked = {"best_of": 4, "n": 2, "temperature": 1.5, "seed": 1, "logprobs": 0}
    answer = await client.complete(**asked)
    return len(answer["choices"]) == 2 and answer["usage"]["completion_tokens"] == 16


async def _suffix(client: Client) -> bool:
    told = await client.complete(suffix=" three four")
    plain = await client.complete()
    return bool(told["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"])


async def _bias(client: Client) -> bool:
    answer = await client.complete(logit_bias={str(_TOKEN): 100}, max_tokens=2)
    text: str = answer["choices"][0]["text"]
    return text.strip() == "store store"


def _inputs(given: object, count: int) -> Check:
    async def check(client: Client) -> bool:
        vectors = await client.embed(input=given)
        return len(vectors) == count and all(vector for vector in vectors)

    return check


async def _base64(client: Client) -> bool:
    (floats,) = await client.embed()
    (text,) = await client.embed(encoding_format="base64")
    packed = base64.b64decode(text)
    return all(map(_near, struct.unpack(f"<{len(packed) // 4}f", packed), floats))


async def _dimensions(client: Client) -> bool:
    (vector,) = await client.embed(dimensions=4)
    return len(vector) == 4 and _near(math.hypot(*vector), 1)


async def _tokenize(client: Client) -> bool:
    asked: dict[str, object] = {"prompt": "one two", "return_token_strs": True}
    answer = await client.post("/v1/tokenize", asked)
    counted = (await client.complete())["usage"]["prompt_tokens"]
    return {len(answer["tokens"]), len(answer["token_strs"]), counted} == {answer["count"]}


async def _tokenize_chat(client: Client) -> bool:
    messages = [{"role": "user", "content": "one two three"}]
    answer = await client.post("/v1/tokenize", {"messages": messages})
    counted = (await client.chat())["usage"]["prompt_tokens"]
    return bool(answer["count"] == counted and answer["max_model_len"] >= counted)


async def _detokenize(client: Client) -> bool:
    tokens = (await client.post("/v1/tokenize", {"prompt": "one"}))["tokens"]
    text: str = (await client.post("/v1/detokenize", {"tokens": tokens}))["prompt"]
    return "one" in text


async def _rerank(client: Client) -> bool:
    documents = ["red", {"text": "one two"}, "blue"]
    asked = {"query": "one two", "documents": documents, "top_n": 2, "return_documents": True}
    results = (await client.post("/v1/rerank", asked))["results"]
    scores = [result["relevance_score"] for result in results]
    return scores == sorted(scores, reverse=True) and len(results) == 2


def _near(one: float, other: float) -> bool:
    return math.isclose(one, other, abs_tol=0.02)


def _rows(group: str, rows: Sequence[tuple[str, Check]]) -> tuple[Behaviour, ...]:
    return tuple(Behaviour(group, name, check) for name, check in rows)


COMPLETIONS = _rows(
    "/v1/completions",
    (
        ("`prompt`: a text; `n`, all of them counted", _prompts("one", 1)),
        ("`prompt`: several texts, all of them counted", _prompts(["one", "two three"], 2)),
        ("`prompt`: token ids; `n`", _prompts(_IDS, 1)),
        ("`prompt`: several lists of token ids", _prompts([_IDS, _IDS[:2]], 2)),
        ("`stream`, several prompts", _stream),
        ("`max_tokens`: 16 where it is not said", _default_length),
        ("`echo`", _echo),
        ("`echo` of token ids", _echo_of_ids),
        ("`logprobs`", _scores),
        ("`logprobs`: 0", _scores_only),
        ("`echo` with `logprobs`: the prompt's own", _echoed_scores),
        ("the same with `max_tokens`: 0", _evaluation),
        ("`best_of`", _best_of),
        ("`suffix`", _suffix),
        ("`logit_bias`", _bias),
    ),
)
OTHERS = (
    *_rows(
        "/v1/embeddings",
        (
            ("`input`: a text", _inputs("one", 1)),
            ("`input`: several texts", _inputs(["one", "two"], 2)),
            ("`input`: token ids", _inputs(_IDS, 1)),
            ("`input`: several lists of token ids", _inputs([_IDS, _IDS[:2]], 2)),
            ("`encoding_format`: `base64`", _base64),
            ("`dimensions`", _dimensions),
        ),
    ),
    *_rows(
        "Others",
        (
            ("`/v1/tokenize`: a text", _tokenize),
            ("`/v1/tokenize`: a chat", _tokenize_chat),
            ("`/v1/detokenize`", _detokenize),
            ("`/v1/rerank`", _rerank),
        ),
    ),
)
