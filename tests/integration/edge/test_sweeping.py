"""Deadlines of many connections: all are kept, and no turn of the event loop looks at them all."""

from __future__ import annotations

from tests.integration.edge.conftest import Edge, MakeEdge, Peer, until

from serverlessllm.edge.server import Request

TURNS = 16
"""Of a sweep; its interval is a second here."""
TIMEOUT_S = 10


async def ok(request: Request) -> None:
    request.respond(200, [], b"")


async def connect(edge: Edge, count: int) -> list[Peer]:
    """So many clients, in this order, that say nothing."""
    peers: list[Peer] = []
    before = edge.server.connections
    for _ in range(count):
        peers.append(await edge.connect())
        await until(lambda: edge.server.connections == before + len(peers))
    return peers


async def closed_by_turn(edge: Edge) -> list[int]:
    """How many connections each turn of the next second closes."""
    closed = []
    for _ in range(TURNS):
        before = edge.server.connections
        await edge.clock.advance(1 / TURNS)
        closed.append(before - edge.server.connections)
    return closed


async def test_a_turn_looks_at_its_share_and_an_interval_at_everyone(make_edge: MakeEdge) -> None:
    edge = await make_edge(ok, idle_timeout_s=TIMEOUT_S)
    await connect(edge, 4 * TURNS)
    await edge.clock.advance(TIMEOUT_S - 1 / TURNS)
    assert edge.server.connections == 4 * TURNS
    assert await closed_by_turn(edge) == [4] * TURNS


async def test_shares_stay_even_while_clients_come_and_go(make_edge: MakeEdge) -> None:
    edge = await make_edge(ok, idle_timeout_s=TIMEOUT_S)
    first = await connect(edge, 2 * TURNS)
    for peer in first[::2]:  # every second share is empty now
        peer.close()
    await until(lambda: edge.server.connections == TURNS)
    await connect(edge, TURNS)
    await edge.clock.advance(TIMEOUT_S - 1 / TURNS)
    assert edge.server.connections == 2 * TURNS
    assert await closed_by_turn(edge) == [2] * TURNS


async def test_fewer_connections_than_turns_wait_no_longer(make_edge: MakeEdge) -> None:
    edge = await make_edge(ok, idle_timeout_s=TIMEOUT_S)
    await connect(edge, 3)
    await edge.clock.advance(TIMEOUT_S - 1 / TURNS)
    assert edge.server.connections == 3
    assert sum(await closed_by_turn(edge)) == 3
