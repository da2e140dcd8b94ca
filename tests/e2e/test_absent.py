"""What is away or full: the hub, the store, the disk, the memory; and that it is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from tests.e2e.served import Served, serving_anew

from serverlessllm.core.units import MIB
from serverlessllm.testing.answers import Answer, ask_chat, check_error, check_explained
from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.hub import Faults, HubServer
from serverlessllm.testing.management import call, register

CHAT: Any = [{"role": "user", "content": "Go."}]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, hub: HubServer) -> Iterator[Served]:
    with serving_anew(tmp_path_factory.mktemp("hub"), {"ingest.hub_endpoint": hub.url}) as system:
        yield system


@pytest.mark.parametrize(
    ("faults", "status", "code", "says"),
    [
        (Faults(status=401), 404, "model_not_found", "HF_TOKEN"),
        (Faults(status=404), 404, "model_not_found", "org/faulty"),
        (Faults(status=429), 503, "source_unavailable", "429"),
        (Faults(status=500), 503, "source_unavailable", "500"),
        (Faults(status=401, files_only=True), 503, "source_access_denied", "HF_TOKEN"),
        (Faults(status=404, files_only=True), 503, "source_changed", "again"),
        (Faults(status=429, files_only=True), 503, "source_unavailable", "429"),
        (Faults(cut_bytes=100_000), 503, "source_unavailable", "cut"),
    ],
    ids=lambda value: (
        f"{value.status}{'-files' * value.files_only}" if isinstance(value, Faults) else ""
    ),
)
def test_a_hub_that_fails_and_recovers(system, hub, weights, faults, status, code, says):
    hub.reset()
    hub.add("org/faulty", {"model.gguf": weights})
    hub.faults = faults
    refused = ask_chat(system.address, "org/faulty")
    assert says in check_error(refused, status, code)
    assert hub.SECRET not in refused.body.decode()

    hub.faults = Faults()
    assert ask_chat(system.address, "org/faulty", max_tokens=1).status == 200
    call(system.address, "DELETE", "/api/models/org/faulty")
    assert system.leftovers() == []


def test_a_model_that_the_hub_does_not_have(system, hub):
    hub.reset()
    refused = ask_chat(system.address, "org/nobody")
    assert "org/nobody" in check_error(refused, 404, "model_not_found")
    assert refused.headers["x-should-retry"] == "false"


@contextlib.contextmanager
def withheld(hub: HubServer, name: str, weights: Path) -> Iterator[None]:
    """The hub has the model, and gives no byte of its files before the end of the block."""
    hub.reset()
    hub.add(name, {"model.gguf": weights})
    hub.gate.clear()
    try:
        yield
    finally:
        hub.gate.set()


def test_the_first_request_for_a_hub_model_streams_comments_then_tokens(system, hub, weights):
    with (
        openai.OpenAI(base_url=f"{system.address}/v1", api_key="unused", timeout=60) as client,
        withheld(hub, "org/streamed", weights),
        client.chat.completions.with_streaming_response.create(
            model="org/streamed", messages=CHAT, max_tokens=4, stream=True
        ) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert next(lines).startswith(":")
        hub.gate.set()
        events = [line for line in lines if line and not line.startswith(":")]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in events[:-1]]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert system.leftovers() == []


def test_who_will_not_wait_is_told_and_the_load_goes_on(system, hub, weights):
    with (
        openai.OpenAI(
            base_url=f"{system.address}/v1", api_key="unused", timeout=60, max_retries=0
        ) as client,
        withheld(hub, "org/impatient", weights),
    ):
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as refused:
                client.chat.completions.create(
                    model="org/impatient", messages=CHAT, extra_headers={"X-SLLM-Wait": "0"}
                )
            answer = refused.value.response
            body = answer.json()
            assert answer.status_code == 503
            assert body["error"]["code"] == "model_loading"
            assert set(body["loading"]) - {"eta_s"} == {"state", "stage", "bytes", "total"}
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            check_explained(Answer(503, dict(answer.headers), answer.content))
        hub.gate.set()
        said = client.chat.completions.create(model="org/impatient", messages=CHAT, max_tokens=1)
        assert said.choices[0].message.content
    assert hub.requests["api"] == 1


# Services that are away


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Neither the store nor the hub answers."""
    credentials = json.dumps({"access_key_id": "k", "secret_access_key": "hidden-s3cr3t"})
    settings = {
        "store_url": "s3://models",
        "store.endpoint": NOWHERE,
        "store.region": "us-east-1",
        "store.allow_http": "true",
        "store.options": credentials,
        "store.tries": "2",
        "ingest.hub_endpoint": NOWHERE,
    }
    with serving_anew(tmp_path_factory.mktemp("offline"), settings) as system:
        yield system


def test_an_unreachable_store(offline, weights):
    register(offline.address, model="tiny", source=weights.as_uri(), backend="fake")
    refused = ask_chat(offline.address, "tiny")
    assert "s3://models" in check_error(refused, 503, "store_unavailable")
    assert "hidden-s3cr3t" not in refused.body.decode()
    assert "hidden-s3cr3t" not in (offline.data_dir / "serve.stderr").read_text()


def test_an_unreachable_hub(offline):
    refused = ask_chat(offline.address, "org/name")
    message = check_error(refused, 503, "source_unavailable")
    assert "127.0.0.1:9" in message
    assert "HF_ENDPOINT" in message


def test_what_needs_neither_is_served(offline):
    register(offline.address, model="fake", backend="fake")
    assert ask_chat(offline.address, "fake").status == 200


# No room


class Room(NamedTuple):
    """A system whose disk can be full."""

    system: Served
    mounted: bool

    def take(self, left_bytes: int) -> None:
        """Leave so much: on the disk, or (who cannot mount one) in any one file."""
        if self.mounted:
            disk = os.statvfs(self.system.data_dir)
            with self._filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - left_bytes)
        else:
            self._limit(left_bytes)

    def give_back(self) -> None:
        if self.mounted:
            self._filler.unlink()
        else:
            self._limit(resource.RLIM_INFINITY)

    @property
    def _filler(self) -> Path:
        return self.system.data_dir / "filler"

    def _limit(self, size_bytes: int) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.prlimit(self.system.process.pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[bool]:
    """A disk of that size at `folder`, if this user may mount one; whether it is there."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module", params=["disk", "file"] if os.geteuid() == 0 else ["file"])
def room(request, tmp_path_factory) -> Iterator[Room]:
    folder = tmp_path_factory.mktemp("room")
    settings = {
        "ingest.space_margin_bytes": "0",
        "loader.dram_budget_bytes": "16MiB",
        "orchestrator.on_demand_sources": "[]",
    }
    with contextlib.ExitStack() as stack:
        size = 64 * MIB if request.param == "disk" else 0
        mounted = bool(size) and stack.enter_context(small_disk(folder, size))
        yield Room(stack.enter_context(serving_anew(folder, settings)), mounted)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 MiB of weights."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    return write_random_gguf(path, layers=20, width=128)


def test_a_full_disk_refuses_an_ingest_and_leaves_nothing(room, large):
    system = room.system
    register(system.address, model="large", source=large.as_uri(), backend="fake")
    room.take(4 * MIB)
    try:
        message = check_error(ask_chat(system.address, "large"), 507, "out_of_space")
        assert "free" in message
        assert system.leftovers() == []
        assert [path for path in (system.data_dir / "store").rglob("*") if path.is_file()] == []
    finally:
        room.give_back()
    assert ask_chat(system.address, "large").status == 200
    system.unload("large", level=3)
    assert system.leftovers() == []


def test_a_full_disk_does_not_stop_a_load_into_memory(room, large):
    system = room.system
    register(system.address, model="stored", source=large.as_uri(), backend="fake")
    call(system.address, "POST", "/api/pull", {"model": "stored"})
    room.take(4 * MIB)
    try:
        answer = ask_chat(system.address, "stored")
        if room.mounted:  # a limit on the files' sizes holds in /dev/shm too
            assert answer.status == 200
            assert ask_chat(system.address, "stored").status == 200
        else:
            assert "loader.dram_dir" in check_error(answer, 507, "out_of_space")
        system.unload("stored", level=3)
        assert system.leftovers() == []
        assert list(system.dram_dir.glob("*.bin")) == []
    finally:
        room.give_back()
    assert ask_chat(system.address, "stored").status == 200
    system.unload("stored", level=3)


def test_models_that_do_not_fit_in_memory_together_take_turns(room, large, tmp_path):
    other = write_random_gguf(tmp_path / "other.gguf", layers=20, width=128, seed=1)
    for model, source in (("first", large), ("second", other)):
        register(room.system.address, model=model, source=source.as_uri(), backend="fake")
    for model in ("first", "second", "first"):
        assert ask_chat(room.system.address, model).status == 200
        assert room.system.copies("dram", model)[0].exists()
    assert len(list(room.system.dram_dir.glob("*.bin"))) == 1
    for model in ("first", "second"):
        call(room.system.address, "DELETE", f"/api/models/{model}")


def test_a_memory_tier_that_is_too_small_names_its_setting(room, tmp_path):
    source = write_random_gguf(tmp_path / "huge.gguf", layers=20, width=160)
    assert source.stat().st_size > 16 * MIB
    system = room.system
    register(system.address, model="huge", source=source.as_uri(), backend="fake")
    message = check_error(ask_chat(system.address, "huge"), 507, "out_of_space")
    assert "loader.dram_budget_bytes" in message
    assert "16.0 MiB" in message
    assert list(system.dram_dir.iterdir()) == []
    call(system.address, "DELETE", "/api/models/huge")


def test_on_demand_ingestion_can_be_switched_off(room):
    refused = ask_chat(room.system.address, "org/name")
    check_error(refused, 404, "model_not_found")
