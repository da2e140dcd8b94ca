"""Fuzz one target: `python tests/fuzz/fuzz.py TARGET [libFuzzer's options] [CORPUS…]`.

Coverage-guided by atheris (libFuzzer). Findings are written to the current folder as `crash-…`,
and replayed by naming the file in place of a corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

_READERS = (
    "serverlessllm.checkpoint",
    "serverlessllm.edge",
    "serverlessllm.openai",
    "serverlessllm.orchestrator.grpc",
)
with atheris.instrument_imports(include=list(_READERS)):
    import gateway_targets
    import targets

from bounded import Bounded  # noqa: E402 - found by the line above
from mutate import mutate_json, mutate_lines, mutate_pickle  # noqa: E402

TARGETS = {**targets.TARGETS, **gateway_targets.TARGETS}
MUTATORS = {
    "adapter_config": mutate_json,
    "dialects": mutate_json,
    "engine_answers": mutate_json,
    "engine_streams": mutate_lines,
    "http_answers": mutate_lines,
    "http_requests": mutate_lines,
    "index": mutate_json,
    "names": mutate_lines,
    "pickle": mutate_pickle,
    "pickle_answer": mutate_lines,
    "requests": mutate_json,
    "safetensors_header": mutate_json,
    "shard_map": mutate_json,
    "torch_file": mutate_pickle,
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: fuzz.py {{{','.join(TARGETS)}}} [options] [corpus…]")
    name = sys.argv.pop(1)
    words = HERE / "words" / f"{name}.dict"
    options = [f"-dict={words}"] if words.exists() else []
    mutator = {"custom_mutator": MUTATORS[name]} if name in MUTATORS else {}
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:]], Bounded(TARGETS[name]), **mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
