"""Tokens to text as they come, texts that stop an answer, chats by template; sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serverlessllm.backends.inside.transformers.sampling import Sampler, Sampling, choose
from serverlessllm.backends.inside.transformers.text import Decoder, Message, Stops, Text
from serverlessllm.core.errors import InvalidRequest, LoadFailed
from serverlessllm.testing.checkpoints import WORDS, write_random_safetensors

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
FIRST_WORD = 3 + 256
"""Token of the first of `WORDS`, after the control tokens and the bytes."""
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_random_safetensors(tmp_path_factory.mktemp("hf"), layers=1)
    return {name: (folder / name).read_bytes() for name in SIDE_FILES}


@pytest.fixture(scope="module")
def text(files: dict[str, bytes]) -> Text:
    """Every byte is a token, so each character beyond ASCII comes in pieces, spaces too: it writes
    them `▁`, and spells words of the prompt in bytes."""
    return Text(files, Path("/nonexistent"))


@pytest.fixture(scope="module")
def byte_level() -> Text:
    """GPT-2's way: bytes as printable characters."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in alphabet] + [
        chr(256 + n) for n in range(256 - len(alphabet))
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": BYTE_LEVEL | {"use_regex": True},
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": dict(zip(characters, range(256), strict=True)),
            "merges": [],
        },
    }
    return Text({"tokenizer.json": json.dumps(tokenizer).encode()}, Path("/nonexistent"))


@settings(max_examples=60, deadline=None)
@given(said=st.text(st.characters(codec="utf-8", exclude_characters="\0▁"), max_size=40))
def test_pieces_join_to_the_text_and_never_cut_a_character(
    text: Text, byte_level: Text, said: str
) -> None:
    for tokenizer, words in ((text, said.replace(" ", "")), (byte_level, said)):
        ids = tokenizer.encode(words)
        decoder = Decoder(tokenizer, tokenizer.encode("before"))
        pieces = [decoder.push([number]) for number in ids]
        if "\N{REPLACEMENT CHARACTER}" not in words:
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert "".join(pieces) + decoder.rest() == words


def test_half_a_character_at_the_end_is_said_as_broken(text: Text) -> None:
    decoder = Decoder(text, ())
    assert decoder.push(text.encode("é")[:1]) == ""
    assert decoder.rest() == "\N{REPLACEMENT CHARACTER}"


def test_a_token_keeps_its_space_after_the_prompt(text: Text) -> None:
    decoder = Decoder(text, text.encode("the"))
    assert decoder.push([FIRST_WORD + WORDS.index("cold")]) == " cold"


def test_a_piece_of_a_character_has_its_bytes(text: Text, byte_level: Text) -> None:
    for tokenizer in (text, byte_level):
        ids = tokenizer.encode("é")
        assert [byte for number in ids for byte in tokenizer.token(number)[1]] == [0xC3, 0xA9]


@settings(max_examples=200, deadline=None)
@given(
    said=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), max_size=30),
)
def test_stops_are_found_in_whatever_pieces_they_come(
    said: str, stops: list[str], cuts: list[int]
) -> None:
    found = Stops(stops)
    out, rest = "", said
    for cut in cuts:
        if found.hit:
            break
        out += found.push(rest[:cut])
        rest = rest[cut:]
    if not found.hit:
        out += found.push(rest, whole=True)
    first = min((at for stop in stops if (at := said.find(stop)) >= 0), default=None)
    assert bool(found.hit) == (first is not None)
    assert not found.hit or found.hit in stops
    assert (out + found.hit) in said
    assert said.startswith(out)
    assert not any(stop in out for stop in stops)
    if first is None:
        assert out == said


def test_a_chat_is_written_by_the_checkpoints_template(text: Text) -> None:
    ids = text.encode_chat(
        [Message(role="user", content="a red")], generation_prompt=True, continue_last=False
    )
    assert text.decode(ids).replace("▁", " ") == "user: a red\nassistant:"
    messages = [Message(role="user", content="a"), Message(role="assistant", content="red bl")]
    ids = text.encode_chat(messages, generation_prompt=False, continue_last=True)
    assert text.decode(ids).endswith("assistant:▁red▁bl")


def test_what_a_template_refuses_is_the_clients_to_know(files: dict[str, bytes]) -> None:
    template = b"{{ raise_exception('roles must alternate') }}"
    text = Text(files | {"chat_template.jinja": template}, Path("/nonexistent"))
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        text.encode_chat(
            [Message(role="x", content="")], generation_prompt=True, continue_last=False
        )


def test_a_template_has_no_way_out_of_its_box(files: dict[str, bytes]) -> None:
    template = b"{{ ''.__class__.__mro__[1].__subclasses__() }}"
    text = Text(files | {"chat_template.jinja": template}, Path("/nonexistent"))
    with pytest.raises(InvalidRequest):
        text.encode_chat(
            [Message(role="x", content="")], generation_prompt=True, continue_last=False
        )


def test_without_a_template_there_are_no_chats(byte_level: Text) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        byte_level.encode_chat(
            [Message(role="user", content="a")], generation_prompt=True, continue_last=False
        )


def test_a_broken_tokenizer_is_a_failed_load() -> None:
    with pytest.raises(LoadFailed, match="tokenizer cannot be read"):
        Text({"tokenizer.json": b'{"model": 5}'}, Path("/nonexistent"))


LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


def draws(times: int = 200, **fields: float) -> set[int]:
    sampler = Sampler(Sampling(seed=1, **fields), ())  # type: ignore[arg-type] # numbers of both kinds
    return {sampler.choose(LOGITS) for _ in range(times)}


def test_a_temperature_of_zero_takes_the_most_likely() -> None:
    assert draws(temperature=0) == {1}
    assert draws(temperature=2) == {0, 1, 2, 3}


def test_top_k_and_top_p_leave_the_unlikely_out() -> None:
    assert draws(temperature=2, top_k=2) == {1, 3}
    shares = (LOGITS / 2).softmax(-1)
    assert draws(temperature=2, top_p=float(shares[1] + shares[3]) - 0.01) == {1, 3}
    assert draws(temperature=2, top_p=0) == {1}


def test_a_seed_decides_every_draw() -> None:
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=2, seed=seed), ())
        return [sampler.choose(LOGITS) for _ in range(20)]

    assert drawn(-5) == drawn(-5) != drawn(1 << 70)


def test_penalties_and_biases_change_what_is_likely() -> None:
    repeating = Sampler(Sampling(temperature=0, presence_penalty=2, frequency_penalty=2), ())
    assert [repeating.choose(LOGITS) for _ in range(4)] == [1, 3, 2, 0]
    again = Sampler(Sampling(temperature=0, repetition_penalty=4), (1,))
    assert again.choose(LOGITS) == 3
    biased = Sampler(Sampling(temperature=0, logit_bias={1: -100, 2: 9, 77: 5}), ())
    assert biased.choose(LOGITS) == 2
    assert LOGITS[1] == 3, "the logits stay as they are"


def test_scores_are_of_the_model_not_of_the_sampling() -> None:
    sampler = Sampler(Sampling(temperature=0, logit_bias={0: 100}, alternatives=2), ())
    assert sampler.choose(LOGITS) == 0
    (score,) = sampler.scores
    expected = LOGITS.log_softmax(-1)
    assert score.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in score.alternatives] == [1, 3]


def test_a_batch_takes_each_row_by_its_own_rule() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])  # the third is nobody's
    greedy = Sampler(Sampling(temperature=0), ())
    scored = Sampler(Sampling(temperature=0, alternatives=0), ())
    assert choose(rows, [greedy, greedy]).tolist() == [1, 2]
    assert choose(rows, [greedy, scored]).tolist() == [1, 2]
    assert len(scored.scores) == 1
