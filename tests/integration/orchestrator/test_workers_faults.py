"""Workers that are killed, hang, are told to leave, crash again and again; and the end of all."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trustme

from serverlessllm.core.apikeys import NewApiKey
from serverlessllm.testing.kept import Kept, one_of_each
from serverlessllm.testing.waiting import eventually

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = BODY | {"stream": True}
GONE = (EOFError, ConnectionError)


def pids(made) -> list[int]:
    found: list[int] = made.front._workers.pids
    return found


async def synced(made) -> None:
    """Every worker knows what the main process knows."""
    await made.front._workers.metrics()


async def all_serve(made, count: int) -> None:
    await eventually(lambda: len(pids(made)) == count)
    await synced(made)


async def replaced(made, pid: int) -> None:
    await eventually(lambda: pid not in pids(made))
    await all_serve(made, 2)


async def figure(made, start: str) -> float:
    text = (await made.ask("/metrics")).body.decode()
    lines = [line for line in text.splitlines() if line.startswith(start)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def total(made) -> float:
    return await figure(made, "sllm_requests_total{")


async def crashes(made) -> float:
    return await figure(made, "sllm_worker_crashes_total ")


@asynccontextmanager
async def load(made, clients: int) -> AsyncIterator[list[int]]:
    """So many clients that ask again and again, anew when their connection breaks: the list has
    each answer's status, 0 for a broken connection, -1 for a refused one."""
    told: list[int] = []
    stop = asyncio.Event()

    async def ask() -> None:
        kept = None
        while not stop.is_set():
            try:
                kept = kept or await Kept.open(made.url)
            except ConnectionRefusedError:
                told.append(-1)
                continue
            try:
                told.append((await kept.ask("POST", CHAT, BODY)).status)
            except GONE:
                told.append(0)
                await kept.close()
                kept = None
            await asyncio.sleep(0)
        if kept is not None:
            await kept.close()

    tasks = [asyncio.create_task(ask()) for _ in range(clients)]
    try:
        yield told
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def test_a_killed_worker_breaks_its_own_connections_and_is_replaced(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    await synced(made)
    counted, crashed_before = await total(made), await crashes(made)
    async with load(made, clients=8) as told:
        await eventually(lambda: len(told) > 50)
        assert set(told) == {200}
        before = await total(made)
        victim, other = pids(made)
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: 0 in told)
        await eventually(lambda: len(pids(made)) == 2 and victim not in pids(made))
        after = len(told)
        await eventually(lambda: len(told) > after + 50)
    assert set(told) == {0, 200}  # nobody was refused, or told of an error
    assert told.count(0) <= 8  # a connection each, those of one worker
    assert told[-40:] == [200] * 40
    assert other in pids(made)
    assert await total(made) >= before > counted
    text = (await made.ask("/metrics")).body.decode()
    assert 'sllm_workers{state="serving"} 2.0' in text
    assert await crashes(made) == crashed_before + 1


async def test_who_had_connected_to_a_worker_that_died_is_answered_by_the_next(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    await synced(made)
    victim = pids(made)[0]
    os.kill(victim, signal.SIGSTOP)  # it accepts nobody any more
    waiting = [await Kept.open(made.url) for _ in range(24)]
    for kept in waiting:
        await kept.send("POST", CHAT, BODY)
    os.kill(victim, signal.SIGKILL)
    for kept in waiting:
        assert (await kept.answer()).status == 200
        await kept.close()


async def test_a_worker_that_is_told_to_leave_finishes_and_another_one_comes(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    await synced(made)
    agent = made.agents[0]
    agent.token_gate.clear()
    connections = await one_of_each(made.url, 2)
    for kept in connections.values():
        await kept.send("POST", CHAT, STREAM)
        await kept.head()
        assert b"one" in await kept.chunk()
    leaver, other = pids(made)
    os.kill(leaver, signal.SIGTERM)
    await eventually(lambda: leaver not in pids(made) and len(pids(made)) == 2)
    assert (await made.ask("/readyz")).status == 200
    assert other in pids(made)
    assert (await made.chat("m")).status == 200
    assert len(made.front._workers._processes) == 3
    agent.token_gate.set()
    for kept in connections.values():
        body = b""
        while piece := await kept.chunk():
            body += piece
        assert body.endswith(b"data: [DONE]\n\n")
        await kept.close()
    await eventually(lambda: len(made.front._workers._processes) == 2)
    counted = await total(made)
    assert counted >= 3  # what the one that left had counted is shown still


async def test_a_worker_does_not_end_of_what_asks_for_a_new_certificate(cluster):
    made = await cluster(workers=2)
    before = pids(made)
    for worker in before:
        os.kill(worker, signal.SIGHUP)
    for _ in range(4):
        assert (await made.ask("/readyz")).status == 200
    await synced(made)
    assert pids(made) == before


async def test_nobody_is_turned_away_while_one_worker_after_the_other_is_renewed(cluster):
    made = await cluster(workers=2, drain_accept_s=0.2)
    await made.warm("m")
    await synced(made)
    first = pids(made)
    async with load(made, clients=4) as told:
        for leaver in first:
            os.kill(leaver, signal.SIGTERM)
            await replaced(made, leaver)
        await eventually(lambda: len(made.front._workers._processes) == 2)
    assert not {*first} & {*pids(made)}
    assert -1 not in told
    assert set(told) <= {0, 200}  # 0: its next request met the end of a connection that was idle


async def test_a_worker_that_hangs_is_killed_and_replaced(cluster):
    made = await cluster(workers=2, worker_silent_s_max=2.5)
    await made.warm("m")
    await synced(made)
    victim = pids(made)[0]
    os.kill(victim, signal.SIGSTOP)
    await replaced(made, victim)
    assert (await made.chat("m")).status == 200


async def test_metrics_do_not_wait_for_a_worker_that_hangs(cluster):
    made = await cluster(workers=2, worker_figures_s_max=0.2)
    await made.warm("m")
    async with load(made, clients=4) as told:
        await eventually(lambda: len(told) > 20)
    before = await total(made)
    victim = pids(made)[0]
    os.kill(victim, signal.SIGSTOP)
    text = (await made.front._workers.metrics()).decode()
    os.kill(victim, signal.SIGCONT)
    lines = [line for line in text.splitlines() if line.startswith("sllm_requests_total{")]
    assert sum(float(line.rpartition(" ")[2]) for line in lines) >= before


async def crashed(times: int, *places) -> None:
    await eventually(lambda: all(place.crashes == times for place in places))


async def crash(made, place, times: int) -> None:
    """Kill whoever has the place, again and again, as soon as it serves."""
    for number in range(1, times + 1):
        await all_serve(made, 2)
        os.kill(place.worker.pid, signal.SIGKILL)
        await crashed(number, place)


async def test_a_new_worker_knows_what_a_key_has_spent(cluster):
    made = await cluster(workers=2)
    await made.warm("m")
    wanted = NewApiKey(name="k", tokens_per_minute=10)
    key, text = await made.registry.create_api_key(wanted)
    await made.until(lambda: key.sha256 in made.front.view.api_keys)
    await synced(made)
    made.agents[0].usage = "500 500"  # paid back in an hour and a half
    bearer = {"authorization": f"Bearer {text}"}
    kept = await Kept.open(made.url)
    assert (await kept.ask("POST", CHAT, BODY, bearer)).status == 200
    await kept.close()
    await eventually(lambda: made.front.quotas.of(key).tokens.left < 0)
    for place in made.front._workers._places:
        os.kill(place.worker.pid, signal.SIGKILL)
    await crashed(1, *made.front._workers._places)
    await all_serve(made, 2)
    for kept in (await one_of_each(made.url, 2)).values():
        assert (await kept.ask("POST", CHAT, BODY, bearer)).status == 429
        await kept.close()


async def test_while_a_worker_crashes_again_and_again_the_others_have_its_clients(cluster):
    made = await cluster(workers=2, worker_restart_s_min=30.0)
    await made.warm("m")
    await synced(made)
    steady = pids(made)[1]
    place = made.front._workers._places[0]
    await crash(made, place, 2)
    await eventually(lambda: not place.sockets)
    for _ in range(32):
        kept = await Kept.open(made.url)
        assert (await kept.ask("POST", CHAT, BODY)).status == 200
        await kept.close()
    assert pids(made) == [steady]
    assert (await made.ask("/readyz")).status == 200


async def test_a_worker_that_crashed_twice_is_back_after_a_pause(cluster):
    made = await cluster(workers=2, worker_restart_s_min=0.1)
    await crash(made, made.front._workers._places[0], 3)
    await all_serve(made, 2)
    for kept in (await one_of_each(made.url, 2)).values():
        await kept.close()


async def test_a_worker_that_cannot_come_back_says_why(cluster, tmp_path, capfd):
    certificate, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    made = await cluster(
        workers=2, tls_certificate=str(certificate), tls_key=str(key), worker_restart_s_min=30.0
    )
    key.write_text("broken")
    place = made.front._workers._places[0]
    os.kill(place.worker.pid, signal.SIGKILL)
    await crashed(2, place)
    assert "are not a certificate and its private key" in capfd.readouterr().err


async def test_without_any_worker_the_server_is_not_ready(cluster):
    made = await cluster(workers=2, worker_restart_s_min=30.0)
    workers = made.front._workers
    assert workers.not_ready() == ""
    for number in (1, 2):
        await all_serve(made, 2)
        for place in workers._places:
            os.kill(place.worker.pid, signal.SIGKILL)
        await crashed(number, *workers._places)
    assert "no worker" in workers.not_ready()
    with pytest.raises(ConnectionRefusedError):
        await Kept.open(made.url)


async def test_a_worker_whose_settings_cannot_be_had_is_told_of_at_start(cluster, monkeypatch):
    monkeypatch.setattr("serverlessllm.orchestrator.app.server_tls", lambda *_: None)
    with pytest.raises(ValueError, match="cannot be read"):
        await cluster(workers=2, tls_certificate="/nowhere.pem", tls_key="/nowhere.key")


async def test_a_drain_lets_every_worker_finish_and_takes_no_more(cluster):
    made = await cluster(workers=2, drain_accept_s=0.5)
    await made.warm("m")
    await synced(made)
    agent = made.agents[0]
    agent.token_gate.clear()
    connections = await one_of_each(made.url, 2)
    for kept in connections.values():
        await kept.send("POST", CHAT, STREAM)
        await kept.head()
    drain = asyncio.create_task(made.front.drain())

    async def not_ready() -> bool:
        return bool((await made.ask("/readyz")).status == 503)

    await eventually(not_ready)

    async def refused() -> bool:
        try:
            kept = await Kept.open(made.url)
        except ConnectionRefusedError:
            return True
        await kept.close()
        return False

    await eventually(refused)
    assert not drain.done()
    agent.token_gate.set()
    for kept in connections.values():
        body = b""
        while piece := await kept.chunk():
            body += piece
        assert body.endswith(b"data: [DONE]\n\n")
        await kept.close()
    await asyncio.wait_for(drain, 60)
    assert pids(made) == []


async def test_a_drain_has_an_end_and_says_so_to_who_is_cut_off(cluster):
    made = await cluster(workers=2, drain_finish_s=0.2)
    await made.warm("m")
    await synced(made)
    made.agents[0].token_gate.clear()
    (kept,) = (await one_of_each(made.url, 1)).values()
    await kept.send("POST", CHAT, STREAM)
    await kept.head()
    await asyncio.wait_for(made.front.drain(), 60)
    body = b""
    while piece := await kept.chunk():
        body += piece
    assert b'"error"' in body
    assert b"[DONE]" not in body
    await kept.close()
