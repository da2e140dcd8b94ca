"""What a connection may cost the edge at most."""

from __future__ import annotations

import asyncio

from tests.integration.edge.conftest import MakeEdge, post, until

from serverlessllm.edge.server import Request

TURNS = 200


async def test_answers_that_nobody_reads_do_not_pile_up(make_edge: MakeEdge) -> None:
    answered = 0

    async def long(request: Request) -> None:
        nonlocal answered
        await request.body()
        answered += 1
        request.respond(200, (), bytes(1 << 20))

    edge = await make_edge(long, pipeline_max=8)
    client = await edge.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it reads, too
    for _ in range(60):
        client.send(post(b"x"))
        await asyncio.sleep(0)
    await until(lambda: answered > 0)
    for _ in range(TURNS):
        await asyncio.sleep(0)
    assert answered < 30  # what the kernel holds, and one
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    for _ in range(60):
        assert (await client.answer()).status in {200, 400}
        if answered == 60:
            break


async def test_a_body_of_single_bytes_is_whole(make_edge: MakeEdge) -> None:
    size = 1 << 17

    async def count(request: Request) -> None:
        request.respond(200, (), b"%d" % len(await request.body()))

    edge = await make_edge(count)
    head = b"POST / HTTP/1.1\r\nhost: edge\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = await edge.ask(head + b"1\r\na\r\n" * size + b"0\r\n\r\n")
    assert answer.body == b"%d" % size
