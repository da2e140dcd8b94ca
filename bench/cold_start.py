"""Cold start against its bound: the backend's own start on the same file, plus the bytes' way.

    python -m bench.cold_start [--rounds 9]

One run, interleaved rounds, medians. Each case is the time to the whole answer of the same
one-token chat:

- `own`: the backend's process, spawned by nobody's system, on the same file in DRAM;
- `dram`: through `sllm serve`, no instance, the bytes in DRAM;
- `nvme`: the same, the bytes on the disk only;
- `hot`: an instance is ready (`bench/warm_request.py` measures what is added then).

The ratio is (time − bytes ÷ the disk's rate) ÷ own, where bytes had to come from the disk: what the
system costs as a multiple of the backend's own start. It should stay under 1.15.

The disk's rate is that of direct reads on the same disk, measured in the same run.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.server import MODEL, served

from serverlessllm.backends.base import Launch, Node
from serverlessllm.backends.llamacpp import LlamaCpp
from serverlessllm.checkpoint.index import decode_index
from serverlessllm.core.ids import InstanceId, ModelId
from serverlessllm.core.models import ModelSpec
from serverlessllm.core.units import format_size
from serverlessllm.loader.measure import measure_disk

CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is 2+2?"}],
    "max_tokens": 1,
    "temperature": 0,
}


def main() -> None:
    """Print the table and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with served() as server:
        server.chat(CHAT)  # ingested, published, loaded: the files lie where the rounds want them
        weights = server.dram_file()
        size_bytes = weights.stat().st_size
        seconds: dict[str, list[float]] = {"own": [], "dram": [], "nvme": [], "hot": []}
        disk_bytes_s = []
        for _ in range(rounds):
            disk_bytes_s.append(measure_disk(server.data_dir))
            server.unload("dram")
            seconds["own"].append(own_start_s(weights))
            seconds["dram"].append(timed(lambda: server.chat(CHAT)))
            seconds["hot"].append(timed(lambda: server.chat(CHAT)))
            server.unload("nvme")
            seconds["nvme"].append(timed(lambda: server.chat(CHAT)))
    report(
        {case: statistics.median(all_s) for case, all_s in seconds.items()},
        size_bytes,
        statistics.median(disk_bytes_s),
        rounds,
    )


def report(medians_s: dict[str, float], size_bytes: int, disk_bytes_s: float, rounds: int) -> None:
    """The table, with the two ratios."""
    moved_s = {"dram": 0.0, "nvme": size_bytes / disk_bytes_s}
    print(
        f"{format_size(size_bytes)} of weights, disk {disk_bytes_s / 1e9:.2f} GB/s, "
        f"medians of {rounds} interleaved rounds"
    )
    print(f"{'case':6} {'ms':>8} {'bytes ms':>9} {'ratio':>6}")
    for case, median_s in medians_s.items():
        bound = ""
        if case in moved_s:
            ratio = (median_s - moved_s[case]) / medians_s["own"]
            bound = f"{moved_s[case] * 1000:9.1f} {ratio:6.2f}"
        print(f"{case:6} {median_s * 1000:8.1f} {bound}")


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def own_start_s(weights: Path) -> float:
    """Spawn the backend as its adapter says, wait until it is ready, ask; then end it."""
    index = decode_index(weights.with_suffix(".idx").read_bytes())
    with tempfile.TemporaryDirectory(prefix="sllm-bench-") as directory:
        launch = Launch(
            instance=InstanceId("bench"),
            spec=ModelSpec(model=ModelId(MODEL)),
            index=index,
            model_path=weights,
            index_path=weights.with_suffix(".idx"),
            run_dir=Path(directory),
            node=Node(cpus=os.cpu_count() or 1, dram_free_bytes=1 << 34),
            slots=4,
        )
        plan = LlamaCpp().launch(launch)
        start = time.perf_counter()
        read_end, write_end = os.pipe()
        process = subprocess.Popen(
            plan.command,
            env=plan.environment | {"SLLM_READY_FD": str(write_end)},
            pass_fds=(write_end,),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(write_end)
        try:
            if not os.read(read_end, 1):
                raise SystemExit("the backend ended before it was ready")
            ask_socket(plan.address.removeprefix("unix:"))
            return time.perf_counter() - start
        finally:
            os.close(read_end)
            process.kill()
            process.wait()


def ask_socket(path: str) -> None:
    """The chat, straight to the backend's socket."""
    connection = http.client.HTTPConnection("backend", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(path)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(CHAT))
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"the backend answered {answer.status}: {answer.read()[:500]!r}")
        answer.read()
    finally:
        connection.close()


if __name__ == "__main__":
    main()
