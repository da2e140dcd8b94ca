"""Damage, lies, full disks and absent services: what a client is told, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest

from serverlessllm.core.ids import Address
from serverlessllm.loader.settings import default_dram_dir
from serverlessllm.testing.answers import Answer, ask_chat, check_error, check_explained
from serverlessllm.testing.checkpoints import write_random_gguf
from serverlessllm.testing.hub import Faults, HubServer
from serverlessllm.testing.management import call, register
from serverlessllm.testing.processes import data_directory, sllm

CHAT: Any = [{"role": "user", "content": "Go."}]
NOWHERE = "http://127.0.0.1:9"
NOTHING_CACHED = {
    "ingest.failure_cache_s": "0",
    "orchestrator.failure_cache_s": "0",
    "agent.failure_cache_s": "0",
    "ingest.sources.tries": "2",
}
"""So that a cured fault is seen to be cured at once, and a lasting one told soon."""
MIB = 1 << 20


class System(NamedTuple):
    """A running `sllm serve` and its directories."""

    address: Address
    pid: int
    data_dir: Path
    dram_dir: Path

    def stored(self, model: str) -> Path:
        """The folder of a model's only revision in the store."""
        (folder,) = (self.data_dir / "store" / model).iterdir()
        return folder

    def copies(self, tier: str, model: str) -> tuple[Path, Path]:
        """`.bin` and `.idx` of a model in a cache tier."""
        folder = {"dram": self.dram_dir, "nvme": self.data_dir / "nvme"}[tier]
        checkpoint = call(self.address, "GET", f"/api/models/{model}")["checkpoint"]["id"]
        return folder / f"{checkpoint}.bin", folder / f"{checkpoint}.idx"

    def unload(self, model: str, level: int) -> None:
        call(self.address, "POST", "/api/unload", {"model": model, "cache_level": level})

    def leftovers(self) -> list[Path]:
        """What no finished or failed request may leave."""
        found = [*self.data_dir.joinpath("ingest").iterdir()]
        found += self.data_dir.joinpath("store").rglob("*#*")
        for folder in (self.data_dir / "nvme", self.dram_dir):
            found += folder.glob("*.partial")
        for bin_path in self.data_dir.joinpath("store").rglob("model.bin"):
            found += [] if bin_path.with_suffix(".idx").exists() else [bin_path]
        return found


@contextlib.contextmanager
def serving(data_dir: Path, settings: dict[str, str]) -> Iterator[System]:
    chosen = [f"--set={key}={value}" for key, value in (NOTHING_CACHED | settings).items()]
    with sllm("serve", "--port", "0", *chosen, data_dir=data_dir) as running:
        dram_dir = Path(settings.get("loader.dram_dir", default_dram_dir(data_dir)))
        yield System(running.address, running.pid, data_dir, dram_dir)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, hub: HubServer) -> Iterator[System]:
    with (
        data_directory(tmp_path_factory.mktemp("faults")) as data_dir,
        serving(data_dir, {"ingest.hub_endpoint": hub.url}) as system,
    ):
        register(system.address, model="fake", backend="fake")
        yield system


def flip(path: Path) -> None:
    """Turn one bit in the middle."""
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Lose the last third."""
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size * 2 // 3)


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "gone": Path.unlink}


# A published checkpoint that somebody damaged


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.bin", "model.idx"])
def test_a_damaged_checkpoint_in_the_store(system, weights, name, damage):
    model = f"stored-{damage}-{name}"
    register(system.address, model=model, source=weights.as_uri(), backend="fake")
    call(system.address, "POST", "/api/pull", {"model": model})
    whole = (system.stored(model) / "model.bin").read_bytes()
    DAMAGES[damage](system.stored(model) / name)

    code = {"gone": "checkpoint_missing"}.get(damage, "invalid_checkpoint")
    if (name, damage) == ("model.bin", "flipped"):
        code = "corrupt_chunk"
    refused = ask_chat(system.address, model)
    message = check_error(refused, 503, code)
    assert refused.headers["x-should-retry"] == "false"
    assert "sllm " in message
    assert not any(path.exists() for path in system.copies("dram", model))
    assert not any(path.exists() for path in system.copies("nvme", model))

    # The cure that the message names.
    if code == "corrupt_chunk":
        call(system.address, "DELETE", f"/api/models/{model}")
        register(system.address, model=model, source=weights.as_uri(), backend="fake")
    call(system.address, "POST", "/api/pull", {"model": model})
    assert ask_chat(system.address, model).status == 200
    assert system.copies("dram", model)[0].read_bytes() == whole
    assert system.leftovers() == []


def test_a_store_that_is_gone_does_not_stop_what_is_cached(system, weights):
    register(system.address, model="cached", source=weights.as_uri(), backend="fake")
    assert ask_chat(system.address, "cached").status == 200
    system.unload("cached", level=1)
    store = system.data_dir / "store"
    store.rename(store.with_name("away"))
    try:
        assert ask_chat(system.address, "cached").status == 200
    finally:
        store.with_name("away").rename(store)


# The tiers heal


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", [0, 1], ids=["bin", "idx"])
def test_a_damaged_nvme_copy_is_never_served(system, weights, part, damage):
    model = f"nvme-{damage}-{part}"
    register(system.address, model=model, source=weights.as_uri(), backend="llamacpp")
    asked: Any = {"max_tokens": 4, "temperature": 0, "seed": 1}
    answer = ask_chat(system.address, model, **asked).json()["choices"]
    system.unload(model, level=2)
    DAMAGES[damage](system.copies("nvme", model)[part])

    assert ask_chat(system.address, model, **asked).json()["choices"] == answer
    whole = (system.stored(model) / "model.bin").read_bytes()
    assert system.copies("dram", model)[0].read_bytes() == whole
    system.unload(model, level=2)  # which waits for the copy that is written again
    assert system.copies("nvme", model)[0].read_bytes() == whole
    assert system.leftovers() == []


def test_damaged_leftovers_in_dram_are_never_adopted(data_dir, weights):
    damages = {f"{damage}-{part}": (damage, part) for damage in DAMAGES for part in (0, 1)}
    with serving(data_dir, {}) as system:
        for model in damages:
            register(system.address, model=model, source=weights.as_uri(), backend="fake")
            assert ask_chat(system.address, model).status == 200
        whole = (system.stored(model) / "model.bin").read_bytes()
        copies = {model: system.copies("dram", model) for model in damages}
    for model, (damage, part) in damages.items():
        DAMAGES[damage](copies[model][part])
    with serving(data_dir, {}) as system:
        for model in damages:
            answer = ask_chat(system.address, model)
            assert answer.status == 200
            assert copies[model][0].read_bytes() == whole, model
        assert system.leftovers() == []


# Sources that lie, or are not there


def _lying_gguf(weights: Path, folder: Path) -> Path:
    data = bytearray(weights.read_bytes())
    data[8:16] = struct.pack("<Q", 1 << 60)  # the number of tensors
    (folder / "lying.gguf").write_bytes(data)
    return folder / "lying.gguf"


def _cut_gguf(weights: Path, folder: Path) -> Path:
    (folder / "cut.gguf").write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder / "cut.gguf"


def _huge_header(_: Path, folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    return folder


def _overlap(_: Path, folder: Path) -> Path:
    row = {"dtype": "F32", "shape": [4]}
    header = json.dumps(
        {"a": row | {"data_offsets": [0, 16]}, "b": row | {"data_offsets": [8, 24]}}
    ).encode()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(24)
    )
    return folder


def _pickle(_: Path, folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not to be opened")
    return folder


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (_lying_gguf, "invalid_checkpoint", "lying.gguf"),
        (_cut_gguf, "invalid_checkpoint", "outside of the file"),
        (_huge_header, "invalid_checkpoint", "does not fit"),
        (_overlap, "invalid_checkpoint", "overlaps"),
        (_pickle, "unsupported_checkpoint", "safetensors"),
    ],
)
def test_a_source_that_cannot_be_converted(system, weights, tmp_path, make, code, says):
    source = make(weights, tmp_path)
    register(system.address, model=make.__name__[1:], source=source.as_uri(), backend="fake")
    refused = ask_chat(system.address, make.__name__[1:])
    assert says in check_error(refused, 503, code)
    assert refused.headers["x-should-retry"] == "false"
    assert str(tmp_path) not in refused.body.decode()
    assert system.leftovers() == []


def test_a_source_that_does_not_exist(system, tmp_path):
    missing = tmp_path / "missing.gguf"
    register(system.address, model="missing", source=missing.as_uri(), backend="fake")
    refused = ask_chat(system.address, "missing")
    assert "missing.gguf" in check_error(refused, 404, "model_not_found")
    assert refused.json()["error"]["param"] == "model"


def test_a_client_cannot_name_a_file_of_the_server(system, weights):
    """Only the operator may: not as a model's name, not on demand."""
    for name in (weights.as_uri(), f"file:{weights}", str(weights), f"../{weights.name}"):
        refused = ask_chat(system.address, name)
        check_error(refused, 400, "invalid_model_name")
        assert refused.json()["error"]["param"] == "model"
    refused = ask_chat(system.address, "nobody")
    assert "registered: " in check_error(refused, 404, "model_not_found")


# The hub


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
            assert set(body["loading"]) == {"state", "stage", "bytes", "total", "eta_s"}
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            check_explained(Answer(503, dict(answer.headers), answer.content))
        hub.gate.set()
        said = client.chat.completions.create(model="org/impatient", messages=CHAT, max_tokens=1)
        assert said.choices[0].message.content
    assert hub.requests["api"] == 1


# Services that are away


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
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
    with (
        data_directory(tmp_path_factory.mktemp("offline")) as data_dir,
        serving(data_dir, settings) as system,
    ):
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

    system: System
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
        resource.prlimit(self.system.pid, resource.RLIMIT_FSIZE, (size_bytes, hard))


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
        data_dir = stack.enter_context(data_directory(folder))
        yield Room(stack.enter_context(serving(data_dir, settings)), mounted)


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
