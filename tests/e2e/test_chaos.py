"""`kill -9` at random points of real processes: what each client saw, and what is served next.

An orchestrator, two agents, eight clients that stream from the fake backend, whose answers are
known. Whatever is killed: every request has one outcome, a stream is a prefix of the unfailed
answer or all of it, and the next request is served.
"""

import contextlib
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from serverlessllm.testing.management import call, register
from serverlessllm.testing.processes import data_directory, sllm

CLIENTS = 8
TOKENS = 40
SEEDS = [1, 2, 3]


class Cluster:
    """Processes by name; each can be killed and started again."""

    def __init__(self, stack, data_dir):
        self.data_dir = data_dir
        self._stack = stack
        self._running = {}
        self.start("front")
        self.start("one")
        self.start("two")
        register(
            self.front.address,
            model="fake",
            backend="fake",
            options={"tokens": str(TOKENS), "token_s": "0.01", "slots": str(CLIENTS)},
        )

    @property
    def front(self):
        return self._running["front"]

    def __getitem__(self, name):
        return self._running[name]

    def start(self, name):
        arguments = ("orchestrator", "--port", "0") if name == "front" else ("agent", "--id", name)
        self._running[name] = self._stack.enter_context(
            sllm(*arguments, data_dir=self.data_dir, name=name)
        )

    def client(self):
        return openai.OpenAI(
            base_url=f"{self.front.address}/v1", api_key="unused", max_retries=0, timeout=30
        )

    def backends(self):
        """Process ids of every agent's backends."""
        agents = [self._running[name] for name in ("one", "two") if self._running[name].alive]
        return [pid for agent in agents for pid in children(agent.pid) if is_backend(pid)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with (
        contextlib.ExitStack() as directory,
        contextlib.ExitStack() as processes,
    ):
        data_dir = directory.enter_context(data_directory(tmp_path_factory.mktemp("chaos")))
        yield Cluster(processes, data_dir)


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def is_backend(pid):
    with contextlib.suppress(OSError):
        return b"backends.inside" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def stream(client, prompt, on_token):
    """One streamed chat: (text, the error that ended it or None)."""
    text = ""
    try:
        with client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": prompt}], stream=True
        ) as chunks:
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
                    on_token()
        return text, None
    except openai.APIError as error:
        return text, error


def storm(cluster, after_tokens, strike):
    """Eight streams at once; `strike` when `after_tokens` tokens were seen by all together."""
    lock = threading.Lock()
    seen = 0
    due = threading.Event()

    def on_token():
        nonlocal seen
        with lock:
            seen += 1
            if seen >= after_tokens:
                due.set()

    with cluster.client() as client, ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(stream, client, f"prompt {n}", on_token) for n in range(CLIENTS)]
        assert due.wait(30)
        strike()
        return [one.result(timeout=30) for one in asked]


def check_outcomes(cluster, outcomes):
    """Each stream is the whole unfailed answer, or a prefix of it and an error of the contract."""
    broken = 0
    with cluster.client() as client:
        for number, (text, error) in enumerate(outcomes):
            whole, failed = stream(client, f"prompt {number}", lambda: None)
            assert failed is None
            if error is None:
                assert text == whole
            else:
                broken += 1
                assert whole.startswith(text)
                assert text != whole
    return broken


def calm(cluster):
    """A request that must succeed: the model is ready."""
    with cluster.client() as client:
        text, error = stream(client, "calm", lambda: None)
    assert error is None
    assert len(text.split()) == TOKENS


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_backend(cluster, seed):
    calm(cluster)

    def strike():
        for pid in cluster.backends():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    after = random.Random(seed).randrange(1, CLIENTS * TOKENS // 2)
    broken = check_outcomes(cluster, storm(cluster, after, strike))
    assert broken > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_agent(cluster, seed):
    calm(cluster)
    serving = next(
        name for name in ("one", "two") if any(map(is_backend, children(cluster[name].pid)))
    )
    orphans = [pid for pid in children(cluster[serving].pid) if is_backend(pid)]
    after = random.Random(seed).randrange(1, CLIENTS * TOKENS // 2)
    outcomes = storm(cluster, after, cluster[serving].kill)
    check_outcomes(cluster, outcomes)  # by the other agent
    assert not any(map(is_backend, orphans))
    cluster.start(serving)
    calm(cluster)


def test_a_killed_orchestrator(cluster):
    calm(cluster)
    outcomes = storm(cluster, CLIENTS * 4, cluster.front.kill)
    assert all(error is not None for _, error in outcomes)
    cluster.start("front")
    check_outcomes(cluster, outcomes)
    assert {
        agent["agent"] for agent in call(cluster.front.address, "GET", "/api/agents")["agents"]
    } == {
        "one",
        "two",
    }
