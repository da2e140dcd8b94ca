"""Whole messages over a socket, however it cuts them; ports that several processes share."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest

from serverlessllm.core.cluster import JobError
from serverlessllm.core.ids import Address, AgentId, KeyId, ModelId
from serverlessllm.core.models import ModelRecord, ModelSpec
from serverlessllm.orchestrator.workers.channel import Channel
from serverlessllm.orchestrator.workers.messages import (
    FRAME_BYTES_MAX,
    AgentFailed,
    Alive,
    FromWorker,
    KeysSpent,
    LoadFailed,
    ModelIs,
    ToWorker,
    frame,
)
from serverlessllm.orchestrator.workers.ports import Port, reserve
from serverlessllm.testing.waiting import eventually


class End:
    """One end of a channel, and what came to it."""

    def __init__(self) -> None:
        self.heard: list[FromWorker] = []
        self.ends = 0
        self.rooms = 0
        self.channel: Channel[FromWorker] = Channel(
            msgspec.msgpack.Decoder(FromWorker), self.heard.append, self._ended, self._room
        )

    def _ended(self) -> None:
        self.ends += 1

    def _room(self) -> None:
        self.rooms += 1


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, socket.socket]]:
    ours, theirs = socket.socketpair()
    end = End()
    await end.channel.open(ours)
    theirs.setblocking(False)
    yield end, theirs
    end.channel.abort()
    theirs.close()
    await eventually(lambda: end.channel.ended)


MESSAGES: list[FromWorker] = [
    Alive(),
    AgentFailed(agent=AgentId("a")),
    KeysSpent(spent={KeyId("k"): (1, -20)}),
]


async def test_messages_come_whole_and_in_order_however_they_are_cut(ends):
    end, peer = ends
    data = b"".join(frame(message) for message in MESSAGES * 3)
    for at in range(0, len(data), 3):
        peer.send(data[at : at + 3])
        await asyncio.sleep(0)
    await eventually(lambda: len(end.heard) == 9)
    assert end.heard == MESSAGES * 3
    peer.send(data)
    await eventually(lambda: len(end.heard) == 18)


@pytest.mark.parametrize(
    "nonsense",
    [
        (FRAME_BYTES_MAX + 1).to_bytes(4, "little"),
        b"\x03\0\0\0abc",
        b"\x02\0\0\0\x91\xa1",
        frame(ModelIs(record=ModelRecord(spec=ModelSpec(model=ModelId("m"))))),
    ],
)
async def test_who_talks_nonsense_is_cut_off(ends, nonsense):
    end, peer = ends
    peer.send(frame(Alive()) + nonsense + frame(Alive()))
    await eventually(lambda: end.ends == 1)
    assert end.heard == [Alive()]


async def test_the_other_ends_end_is_noticed_and_nothing_is_sent_then(ends):
    end, peer = ends
    peer.close()
    await eventually(lambda: end.ends == 1)
    end.channel.send(Alive())
    assert end.ends == 1


async def test_an_end_that_does_not_read_is_told_so_and_heard_of_when_it_does(ends):
    end, peer = ends
    message = frame(AgentFailed(agent=AgentId("a" * 1000)))
    sent = 0
    while not end.channel.full:
        end.channel.send_frame(message)
        sent += 1
    assert end.rooms == 0
    assert sent * len(message) < 4 << 20
    come = 0
    while come < sent * len(message):
        try:
            come += len(peer.recv(1 << 20))
        except BlockingIOError:
            await asyncio.sleep(0)
    assert (end.rooms, end.channel.full) == (1, False)


def test_every_message_survives_its_journey():
    error = JobError(code="load_failed", message="why", status=503)
    told = LoadFailed(wish=3, error=error, param=None, retry_after_s=1.5)
    data = frame(told)
    assert msgspec.msgpack.Decoder(ToWorker).decode(data[4:]) == told


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    taken = await reserve(Address("http://127.0.0.1:0"))
    yield taken
    taken.close()


async def test_a_port_is_one_for_all_and_only_who_listens_is_connected_to(port):
    assert port.address.startswith("http://127.0.0.1:")
    number = int(port.address.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", number))
    shares = [*port.share(), *port.share()]
    assert {share.getsockname() for share in shares} == {("127.0.0.1", number)}
    for share in shares:
        share.listen()
    socket.create_connection(("127.0.0.1", number)).close()
    for share in shares:
        share.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", number))


async def test_a_second_server_does_not_slip_into_the_port(port):
    (share,) = port.share()
    with share:
        share.listen()
        with pytest.raises(OSError, match="in use"):
            await reserve(port.address)


async def test_a_name_of_two_addresses_has_one_port_on_both():
    found = await asyncio.get_running_loop().getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    port = await reserve(Address("http://localhost:0"))
    try:
        shares = port.share()
        assert len(shares) == len({where for *_, where in found})
        assert len({share.getsockname()[1] for share in shares}) == 1
        for share in shares:
            share.close()
    finally:
        port.close()


async def test_a_unix_socket_is_one_processs_own():
    with pytest.raises(ValueError, match="workers to 1"):
        await reserve(Address("unix:/tmp/x.sock"))
