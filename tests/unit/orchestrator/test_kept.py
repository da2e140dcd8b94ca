"""Stored responses: bounded in number, bytes and time, and each key sees its own."""

from __future__ import annotations

import msgspec
import pytest

from serverlessllm.orchestrator.rest.kept import (
    ItemNotFound,
    Kept,
    KeptItem,
    KeptResponses,
    PreviousResponseNotFound,
    ResponseNotFound,
)
from serverlessllm.orchestrator.settings import OrchestratorSettings
from serverlessllm.testing.clock import VirtualClock

ME, YOU = b"me", b"you"


def store(clock=None, **settings):
    asked = msgspec.convert(settings, OrchestratorSettings)
    return KeptResponses(asked, clock or VirtualClock())


def response(name, *, scope=ME, items=(), text=b"{}"):
    return Kept(
        id=name,
        scope=scope,
        body=text,
        given=tuple(KeptItem(item, b'"' + item.encode() + b'"') for item in items),
        output=(KeptItem(f"{name}-out", b'"out"'),),
    )


def names(kept, *all_names):
    found = []
    for name in all_names:
        try:
            found.append(kept.get(ME, name).id)
        except ResponseNotFound:
            continue
    return found


def test_what_is_put_is_found_until_it_is_deleted():
    kept = store()
    kept.put(response("a", items=["i"]))
    assert kept.get(ME, "a").items == (KeptItem("i", b'"i"'), KeptItem("a-out", b'"out"'))
    assert kept.item(ME, "a-out", "input[0]").data == b'"out"'
    kept.delete(ME, "a")
    assert (len(kept), kept.size_bytes) == (0, 0)
    with pytest.raises(ResponseNotFound, match="Response with id 'a' not found"):
        kept.delete(ME, "a")
    with pytest.raises(ItemNotFound) as missing:
        kept.item(ME, "a-out", "input[0]")
    assert missing.value.param == "input[0]"


def test_another_key_sees_nothing_of_it():
    kept = store()
    kept.put(response("a", items=["i"]))
    for ask in (kept.get, kept.delete):
        with pytest.raises(ResponseNotFound):
            ask(YOU, "a")
    with pytest.raises(ItemNotFound):
        kept.item(YOU, "i", "input[0]")
    with pytest.raises(PreviousResponseNotFound) as missing:
        kept.previous(YOU, "a")
    assert (missing.value.status, missing.value.param) == (404, "previous_response_id")
    assert kept.previous(ME, "a").id == "a"


def test_the_least_recently_used_makes_room():
    kept = store(responses_max=2)
    kept.put(response("a"))
    kept.put(response("b"))
    kept.get(ME, "a")
    kept.put(response("c"))
    assert names(kept, "a", "b", "c") == ["a", "c"]


def test_bytes_are_bounded():
    one = response("a", text=b"x" * 1000).size_bytes
    kept = store(responses_bytes_max=2 * one)
    for name in "abc":
        kept.put(response(name, text=b"x" * 1000))
    assert names(kept, "a", "b", "c") == ["b", "c"]
    kept.put(response("d", text=b"x" * 3 * one))
    assert names(kept, "b", "c", "d") == ["b", "c"]
    assert kept.size_bytes == 2 * one


async def test_each_has_its_time():
    clock = VirtualClock()
    kept = store(clock, responses_ttl_s=10.0)
    kept.put(response("a"))
    await clock.advance(6)
    kept.put(response("b"))
    kept.get(ME, "a")
    await clock.advance(5)
    assert names(kept, "a", "b") == ["b"]
    await clock.advance(5)
    assert names(kept, "b") == []
    assert kept.size_bytes == 0


def test_an_item_is_found_as_long_as_a_response_has_it():
    kept = store()
    kept.put(response("a", items=["i"]))
    kept.put(response("b", items=["i", "a-out"]))
    kept.delete(ME, "a")
    assert kept.item(ME, "i", "input[0]").data == b'"i"'
    assert kept.item(ME, "a-out", "input[0]").data == b'"a-out"'


def test_nothing_is_kept_where_nothing_may_be():
    kept = store(responses_max=0)
    kept.put(response("a"))
    assert len(kept) == 0


class Compared(str):
    """A name that counts how many it was compared with."""

    __slots__ = ("times",)
    __hash__ = str.__hash__
    times: int

    def __eq__(self, other: object) -> bool:
        self.times += 1
        return str.__eq__(self, other)


def test_finding_an_item_takes_no_longer_among_many():
    kept = store()
    many = [f"i{number}" for number in range(16_384)]
    kept.put(response("a", items=many))
    asked = Compared("i16383")
    asked.times = 0
    assert kept.item(ME, asked, "input[0]").id == "i16383"
    assert asked.times < 10
