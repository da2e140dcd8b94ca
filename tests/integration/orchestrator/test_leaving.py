"""Clients that leave: wherever they were, what was done for them ends."""

from __future__ import annotations

import pytest

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("stream", [True, False])
async def test_before_the_first_token(cluster, stream):
    c = await cluster()
    await c.warm("m")
    agent = c.agents[0]
    agent.first_gate.clear()
    client = await c.open({**ASK, "stream": stream})
    await c.until(lambda: agent.running == 1)
    await client.leave()
    await c.until(lambda: agent.cancelled == 1)
    assert c.front._router.in_flight == 0


async def test_after_the_first_token(cluster):
    c = await cluster()
    await c.warm("m")
    agent = c.agents[0]
    agent.token_gate.clear()
    client = await c.open({**ASK, "stream": True})
    await client.read_until(b"one")
    await client.leave()
    await c.until(lambda: agent.cancelled == 1)
    assert c.front._router.in_flight == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_the_last_waiter_ends_the_load(cluster, stream):
    c = await cluster(stream_grace_s=0.01)
    await c.register("m")
    agent = c.agents[0]
    agent.load_gate.clear()
    clients = [await c.open({**ASK, "stream": stream}) for _ in range(2)]
    await c.until(lambda: c.front._room.waiting == 2 and len(agent.loads) == 1)
    await clients[0].leave()
    await c.until(lambda: c.front._room.waiting == 1)
    assert agent.cancelled == 0
    await clients[1].leave()
    await c.until(lambda: agent.cancelled == 1)
    assert c.front._room.loading == 0


async def test_a_wanted_load_outlives_its_clients(cluster):
    c = await cluster()
    await c.register("m", min_replicas=1)
    agent = c.agents[0]
    await c.until(lambda: "m" in agent.ready)
    agent.ready.clear()
    agent.load_gate.clear()
    await agent.beat()
    await c.until(lambda: len(agent.loads) == 2)
    client = await c.open(ASK)
    await c.until(lambda: c.front._room.waiting == 1)
    await client.leave()
    await c.until(lambda: c.front._room.waiting == 0)
    later = await c.open(ASK)
    await c.until(lambda: c.front._room.waiting == 1)
    agent.load_gate.set()
    assert b" 200 " in await later.read_until(b"\r\n")
    await later.leave()
    assert (len(agent.loads), agent.cancelled) == (2, 0)


async def test_nothing_is_left_behind_by_many_who_leave(cluster):
    c = await cluster()
    await c.warm("m")
    agent = c.agents[0]
    agent.first_gate.clear()
    clients = [await c.open({**ASK, "stream": True}) for _ in range(30)]
    await c.until(lambda: agent.running == 30)
    for client in clients:
        await client.leave()
    await c.until(lambda: agent.cancelled == 30 and c.front._router.in_flight == 0)
    agent.first_gate.set()
    assert (await c.chat("m")).status == 200
