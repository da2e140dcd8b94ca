"""`sllm serve` as a benchmark's subject, asked over one kept connection."""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serverlessllm.loader.settings import default_dram_dir
from serverlessllm.testing.processes import Process, data_directory, sllm

MODEL = "smollm2"


class Server:
    """A served data directory."""

    def __init__(self, process: Process, data_dir: Path, run_dir: Path) -> None:
        self.process = process
        self.data_dir = data_dir
        self.run_dir = run_dir
        """Where the sockets of agents and backends are."""
        self.connection = http.client.HTTPConnection(
            process.address.removeprefix("http://"), timeout=120
        )

    def post(self, path: str, body: object) -> bytes:
        """POST JSON; the answer's body, or the end of the benchmark with what was wrong."""
        self.connection.request(
            "POST", path, json.dumps(body), {"content-type": "application/json"}
        )
        answer = self.connection.getresponse()
        data = answer.read()
        if answer.status >= 300:
            raise SystemExit(f"{path} answered {answer.status}: {data[:500]!r}")
        return data

    def chat(self, body: object) -> bytes:
        """One chat completion."""
        return self.post("/v1/chat/completions", body)

    def unload(self, tier: str) -> None:
        """Stop the instance; keep the bytes in `tier` and what lies below."""
        level = {"dram": 1, "nvme": 2, "store": 3}[tier]
        self.post("/api/unload", {"model": MODEL, "cache_level": level})

    def dram_file(self) -> Path:
        """The weights in DRAM of the one model that was loaded."""
        (weights,) = default_dram_dir(self.data_dir).glob("*.bin")
        return weights


@contextlib.contextmanager
def served(*arguments: str) -> Iterator[Server]:
    """`sllm serve` on a free port and a data directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="sllm-bench-") as parent,
        data_directory(Path(parent)) as data_dir,
        sllm(
            *("serve", "--port", "0", "--set", f"runtime_dir={parent}/run", *arguments),
            data_dir=data_dir,
        ) as process,
    ):
        server = Server(process, data_dir, Path(parent) / "run")
        with contextlib.closing(server.connection):
            yield server
