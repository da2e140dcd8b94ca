"""Our loader beside the loaders a user could pick, on the same weights, in one run.

    python -m bench.load [--size 1GiB] [--rounds 5] [--only NAME …] [--docs]

Each sample is a process of its own, in the peer's own environment (scripts/peers.sh builds them);
time runs inside it from the call until every tensor is usable (bench/peers/timed.py). Rounds are
interleaved, medians printed, ratios first. A cold sample's file is dropped from the page cache
before, a warm one's is read into it, and the kernel is asked whether that is so. The limit is
fio's best direct read of the very file that our nvme tier holds. The weights are a Llama of random
BF16 in bench/results/weights, made once, in every format.

`--docs` writes table and plot into docs/benchmarks.md and docs/benchmarks/load.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
from pathlib import Path
from statistics import median

import msgspec
from bench import fio
from bench.place import ROOT, Place, make_weights, peer
from bench.ready import measure_ready
from bench.report import Results, Row, Sample, print_results, write_docs

from serverlessllm.checkpoint.index import IDX_NAME
from serverlessllm.core.cluster import CacheLevel
from serverlessllm.core.units import format_size, parse_size_bytes
from serverlessllm.loader.settings import LoaderSettings
from serverlessllm.loader.trial.measure import measure
from serverlessllm.loader.trial.page_cache import cached_share, forget
from serverlessllm.loader.trial.place import private_directory
from serverlessllm.loader.trial.report import Report

RESULTS = ROOT / "bench" / "results"
COLD_MAX, WARM_MIN = 0.01, 0.99
"""Of a file, in the page cache, for a sample to count as cold or as warm."""
OURS = "serverlessllm"
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One row to be: how a loader is called, and on which file."""

    label: str
    peer: str
    arguments: tuple[str, ...]
    """Of its script."""
    file: Path
    """What it reads."""
    cache: str = "cold"
    """`cold`, `warm`, or `none`: the page cache plays no part."""
    before: str | None = None
    """Of ours: the mode that runs before, untimed."""


def main() -> None:
    """Run, print, and with `--docs` write what was printed."""
    options = _options()
    if shutil.which("fio") is None:
        sys.exit("bench: this machine lacks fio; run: sudo apt-get install fio")
    RESULTS.mkdir(parents=True, exist_ok=True)
    results = _run(options.size, options.rounds, options.only)
    (RESULTS / "load.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)))
    print_results(results)
    if options.docs:
        write_docs(results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="1GiB", type=parse_size_bytes)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these peers, as in .venvs/")
    parser.add_argument("--docs", action="store_true", help="write the results into docs/")
    return parser.parse_args()


def _run(size_bytes: int, rounds: int, only: list[str] | None) -> Results:
    _say("transformers")
    ready = measure_ready(RESULTS / "weights", rounds)
    _say("weights")
    os.environ["BENCH_BACKED_BYTES"] = str(size_bytes * 3 // 2)  # of bench/peers/timed.py
    folder = RESULTS / "weights" / format_size(size_bytes).replace(" ", "")
    checkpoints = make_weights(folder, size_bytes)
    with private_directory(RESULTS) as work, private_directory(Path("/dev/shm")) as shm:
        place = Place(folder=folder, work=work, dram=shm / "dram", checkpoints=checkpoints)
        _prepare("fill", place)
        forget(place.nvme_path)
        _say("fio")
        way = fio.best_way(place.nvme_path)
        targets = [t for t in _targets(place) if not only or t.peer in {*only, OURS}]
        taken: list[list[Sample]] = [[] for _ in targets]
        limits: list[float] = []
        for number in range(rounds):
            _say(f"round {number + 1} of {rounds}")
            limits.append(fio.read(place.nvme_path, way, place.nvme_path.stat().st_size) or 0.0)
            for step in range(len(targets)):
                at = (step + number) % len(targets)  # another one first in each round
                if not any(sample.error for sample in taken[at]):
                    taken[at].append(_sample(targets[at], place))
    _say("second process")
    nvme, handover = (_trial(folder, tier, rounds) for tier in (CacheLevel.NVME, CacheLevel.DRAM))
    return Results(
        size_bytes=checkpoints[0].size_bytes,
        rounds=rounds,
        limit_bytes_s=median(limits),
        limit=f"fio, {way}",
        rows=[
            Row.of(target.label, target.cache, samples, ours=target.peer == OURS)
            for target, samples in zip(targets, taken, strict=True)
        ],
        nvme=nvme,
        handover=handover,
        ready=ready,
    )


def _targets(place: Place) -> list[Target]:
    orders = place.encode()
    hf = place.folder / "hf"
    tensors = hf / "model.safetensors"
    torch_file, serialized = place.folder / "model.pt", place.folder / "model.tensors"
    stored = place.store_dir / place.checkpoints[0].prefix / "model.bin"

    def ours(mode: str, label: str, file: Path, **more: str) -> Target:
        return Target(
            label=f"ServerlessLLM, {label}",
            peer=OURS,
            arguments=(mode, orders),
            file=file,
            cache=more.get("cache", "cold"),
            before=more.get("before"),
        )

    def other(
        label: str, name: str, *mode: str, file: Path = tensors, cache: str = "cold"
    ) -> Target:
        return Target(label=label, peer=name, arguments=(*mode, str(file)), file=file, cache=cache)

    return [
        ours("nvme", "nvme → DRAM", place.nvme_path),
        ours("recycled", "nvme → full DRAM", place.nvme_path),
        ours("store", "store → DRAM", stored),
        ours("dram", "in DRAM already", place.nvme_path, cache="none", before="leave"),
        other("safetensors load_file", "safetensors", "mmap"),
        other("safetensors load_file, warm", "safetensors", "mmap", cache="warm"),
        other("safetensors load_file, pread", "safetensors", "pread"),
        other("torch.load", "torch", "plain", file=torch_file),
        other("torch.load, warm", "torch", "plain", file=torch_file, cache="warm"),
        other("torch.load, mmap", "torch", "mmap", file=torch_file),
        other("Run:ai model streamer", "runai"),
        other("tensorizer", "tensorizer", "load", file=serialized),
        other("fastsafetensors", "fastsafetensors"),
        other("InstantTensor", "instanttensor"),
        Target(
            label="transformers from_pretrained",
            peer="transformers",
            arguments=("tensors", str(hf)),
            file=tensors,
        ),
    ]


def _sample(target: Target, place: Place) -> Sample:
    """One process."""
    if target.before is not None:
        _prepare(target.before, place)
    if not target.file.exists():
        return Sample(error=f"no {target.file.name}: its environment could not write one")
    _set_cache(target)
    try:
        done = peer(target.peer, *target.arguments)
    except FileNotFoundError:
        return Sample(error=_why_missing(target.peer))
    try:
        return msgspec.json.decode((done.stdout.splitlines() or [""])[-1], type=Sample)
    except msgspec.DecodeError:
        return Sample(error=(done.stderr.strip().splitlines() or ["it printed nothing"])[-1])


def _why_missing(name: str) -> str:
    """What scripts/peers.sh was told when it tried to install a peer."""
    log = ROOT / ".venvs" / f"{name}.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return f"not installed: {lines[-1] if lines else 'run scripts/peers.sh'}"


def _set_cache(target: Target) -> None:
    """Have the file in the page cache, or not; the kernel's own word is taken for it."""
    if target.cache == "none":
        return
    if target.cache == "warm":
        with target.file.open("rb") as file:
            while file.read(1 << 24):
                pass
    else:
        forget(target.file)
        if (cached_share(target.file) or 0.0) > COLD_MAX and os.access(_DROP_CACHES, os.W_OK):
            _DROP_CACHES.write_text("1")  # somebody maps it; all files suffer
    share = cached_share(target.file)
    if share is not None and (share < WARM_MIN if target.cache == "warm" else share > COLD_MAX):
        raise RuntimeError(f"{share:.1%} of {target.file.name} are cached, not {target.cache}")


def _prepare(mode: str, place: Place) -> None:
    done = peer(OURS, mode, place.encode())
    if done.returncode:
        raise RuntimeError(f"our loader failed to {mode} its tiers: {done.stderr[-2000:]}")


def _trial(folder: Path, tier: CacheLevel, rounds: int) -> Report:
    """What `sllm bench load` prints of the same checkpoint."""
    return asyncio.run(
        measure(
            folder / "store" / "bench" / "one" / IDX_NAME,
            tier,
            disk=RESULTS,
            settings=LoaderSettings(),
            rounds=rounds,
            tell=lambda _number: None,
        )
    )


def _say(what: str) -> None:
    print(f"load: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
