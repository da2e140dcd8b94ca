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

import openai
import pytest

from serverlessllm.testing.management import call, register
from serverlessllm.testing.processes import alive, data_directory, sllm
from serverlessllm.testing.waiting import eventually_blocking

CLIENTS = 8
CALM_TOKENS = 40
TOKENS = 250
"""So many that no stream is over before what shall break it, however slowly that comes."""
BACKEND = "backends.inside"
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
            options={"tokens": "1000", "token_s": "0.01", "slots": str(CLIENTS)},
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
        return [pid for agent in agents for pid in agent.children(BACKEND)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with (
        contextlib.ExitStack() as directory,
        contextlib.ExitStack() as processes,
    ):
        data_dir = directory.enter_context(data_directory(tmp_path_factory.mktemp("chaos")))
        yield Cluster(processes, data_dir)


def stream(client, prompt, tokens, on_token=lambda: None):
    """One streamed chat: (text, the error that ended it or None)."""
    text = ""
    try:
        with client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=tokens,
            stream=True,
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
        asked = [
            pool.submit(stream, client, f"prompt {n}", TOKENS, on_token) for n in range(CLIENTS)
        ]
        due.wait()
        strike()
        return [one.result() for one in asked]


def check_outcomes(cluster, outcomes):
    """Each stream is the whole unfailed answer, or a prefix of it and an error of the contract."""
    counts = [len(text.split()) for text, _ in outcomes]
    with cluster.client() as client, ThreadPoolExecutor(CLIENTS) as pool:
        again = pool.map(
            lambda n: stream(client, f"prompt {n}", counts[n] or 1), range(len(outcomes))
        )
        for (text, error), count, (unfailed, failed) in zip(outcomes, counts, again, strict=True):
            assert failed is None
            assert text == (unfailed if count else "")
            assert (count == TOKENS) == (error is None)
    return sum(error is not None for _, error in outcomes)


def calm(cluster):
    """A request that must succeed: the model is ready."""
    with cluster.client() as client:
        text, error = stream(client, "calm", CALM_TOKENS)
    assert error is None
    assert len(text.split()) == CALM_TOKENS


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_backend(cluster, seed):
    calm(cluster)

    def strike():
        for pid in cluster.backends():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    after = random.Random(seed).randrange(1, CLIENTS * CALM_TOKENS)
    broken = check_outcomes(cluster, storm(cluster, after, strike))
    assert broken > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_agent(cluster, seed):
    calm(cluster)
    serving = next(name for name in ("one", "two") if cluster[name].children(BACKEND))
    orphans = cluster[serving].children(BACKEND)
    after = random.Random(seed).randrange(1, CLIENTS * CALM_TOKENS)
    outcomes = storm(cluster, after, cluster[serving].kill)
    check_outcomes(cluster, outcomes)  # by the other agent
    eventually_blocking(lambda: alive(orphans) == [])
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
