"""A running `sllm serve` as its operator sees it from outside: answers, files, processes, logs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from serverlessllm.config.paths import derive
from serverlessllm.config.settings import Settings
from serverlessllm.core.agentapi import TOKEN_HEADER
from serverlessllm.core.ids import Address
from serverlessllm.loader.settings import default_dram_dir
from serverlessllm.testing.answers import ask
from serverlessllm.testing.management import call
from serverlessllm.testing.processes import Process, data_directory, sllm

NOTHING_CACHED = {
    "ingest.failure_cache_s": "0",
    "orchestrator.failure_cache_s": "0",
    "agent.failure_cache_s": "0",
    "ingest.sources.tries": "2",
}
"""So that a cured fault is seen to be cured at once, and a lasting one told soon."""


class Served(NamedTuple):
    """The process, and where it keeps its things."""

    process: Process
    data_dir: Path

    @property
    def address(self) -> Address:
        return self.process.address

    @property
    def dram_dir(self) -> Path:
        return default_dram_dir(self.data_dir)

    @property
    def runtime_dir(self) -> Path:
        return derive(Settings(data_dir=str(self.data_dir)), os.environ).runtime_dir

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
        """Stop its instances, and drop copies nearer than this cache level."""
        call(self.address, "POST", "/api/unload", {"model": model, "cache_level": level})

    def leftovers(self) -> list[Path]:
        """What no request may leave, however it ended."""
        store = self.data_dir / "store"
        found = [*self.data_dir.joinpath("ingest").iterdir(), *store.rglob("*#*")]
        for folder in (self.data_dir / "nvme", self.dram_dir):
            found += folder.glob("*.partial")
        return found + [p for p in store.rglob("model.bin") if not p.with_suffix(".idx").exists()]

    def starts(self, model: str) -> int:
        """Backend processes of the model that became ready."""
        lines = map(json.loads, self.process.log.read_text().splitlines())
        return sum(line["event"] == "agent.start" and line["model"] == model for line in lines)

    def backend(self, figure: str) -> int:
        """One of the figures that the fake backends tell, over all that run."""
        sockets = self.runtime_dir.glob("a-*/*/backend.sock")
        told = []
        for path in sockets:
            # Bound and not listening yet, or about to end.
            with contextlib.suppress(ConnectionError, FileNotFoundError):
                told.append(ask(Address(f"unix:{path}"), "GET", "/stats"))
        return sum(each.json()[figure] for each in told if each.status == 200)

    def held(self) -> int:
        """Requests that the agent holds, by its own word."""
        (agent,) = call(self.address, "GET", "/api/agents")["agents"]
        token = (self.data_dir / "cluster-token").read_text()
        status = ask(agent["record"]["address"], "GET", "/status", headers={TOKEN_HEADER: token})
        return sum(model["queue_len"] for model in status.json()["models"])


@contextlib.contextmanager
def serving(data_dir: Path, settings: dict[str, str] | None = None) -> Iterator[Served]:
    """`sllm serve` on `data_dir` until the block ends."""
    chosen = [f"--set={key}={value}" for key, value in (NOTHING_CACHED | (settings or {})).items()]
    with sllm("serve", "--port", "0", *chosen, data_dir=data_dir) as process:
        yield Served(process, data_dir)


@contextlib.contextmanager
def serving_anew(parent: Path, settings: dict[str, str] | None = None) -> Iterator[Served]:
    """The same on a data directory of its own, of which nothing stays."""
    with data_directory(parent) as data_dir, serving(data_dir, settings) as served:
        yield served
