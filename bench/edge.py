"""What a request, a streamed chunk and a held connection cost at our edge, beside the routers that
a user could put there.

    python -m bench.edge                                  everything, some 15 minutes
    python -m bench.edge --peer nginx --peer orchestrator --load "32 connections" --rounds 3
    python -m bench.edge --rounds 0 --held 3 --peer orchestrator      beside slow clients only
    python -m bench.edge --docs                           and write it into docs/benchmarks.md

All of them pass requests to one mock (C) and are asked by one load program (C), in turns; CPU is
that of the whole process tree, the steadiest figure on a shared machine, and a sample during which
others used the machine is taken again. `orchestrator` is the real one, with a key, limits, routing
and metrics on; `edge` is its proxy alone. Only the ratios mean anything elsewhere. Peers come from
`scripts/peers.sh` and `apt-get install nginx-light haproxy gcc`; one that is missing says so.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
from pathlib import Path

import msgspec
from bench.edges.measure import LOADS, measure
from bench.edges.process import ROOT
from bench.edges.report import document, tables, verdicts
from bench.edges.targets import PEERS

_RESULTS = ROOT / "bench" / "results" / "edge.json"


def main() -> None:
    """Run, print tables and bounds; fails when a bound does not hold."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and the processes with it
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loads = [load for load in LOADS if not options.load or load.name in options.load]
    with tempfile.TemporaryDirectory(prefix="sllm-edge-") as folder:
        found = measure(
            Path(folder),
            options.peer,
            loads,
            rounds=options.rounds,
            held_rounds=options.held,
            foreign_max=options.foreign,
        )
    print(tables(found), end="\n\n")
    said = verdicts(found)
    for _, text in said:
        print(text)
    if options.docs:
        _RESULTS.parent.mkdir(exist_ok=True)
        _RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        document(found)
    if not all(good for good, _ in said):
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peer", action="append", default=[], choices=names)
    parser.add_argument("--load", action="append", default=[], choices=[x.name for x in LOADS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--held", type=int, default=3, help="rounds beside slow connections")
    parser.add_argument(
        "--foreign", type=float, default=0.3, help="cores that others may use beside a sample"
    )
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
