"""The hostile corpus against a converting process that is watched: it does nothing but refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serverlessllm.core import errors
from serverlessllm.testing.hostile import Hostile, hostile_checkpoints
from serverlessllm.testing.hostile_pickles import CANARY

# Whatever the interpreter tells of is refused: what is left are reads of the source's own files.
_VICTIM = """
import json, os, resource, sys
from pathlib import Path
from serverlessllm.checkpoint.convert import convert
from serverlessllm.checkpoint.sources import torch_zip
from serverlessllm.checkpoint.sources.base import open_folder
from serverlessllm.core.errors import SLLMError

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
if sys.argv[3] == "within":
    from serverlessllm.checkpoint.pickles.interpreter import read_state_dict
    torch_zip.read_state_dict_apart = read_state_dict
HARMLESS = {"builtins.id", "object.__getattr__", "os.listdir", "os.scandir", "sys._getframe"}
seen = []

def watch(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) == 0 and (
        str(arguments[0]).startswith(str(folder))
    ):
        return
    if event not in HARMLESS:
        seen.append(event + " " + str(arguments)[:200])

def refuse():
    try:
        convert(open_folder(folder, model="test/model"), out)
    except SLLMError as error:
        return type(error).__name__, error.message
    return "nothing", ""

refuse()  # once for what is imported and compiled late
print("ready", flush=True)
sys.addaudithook(watch)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for line in sys.stdin:
    seen.clear()
    raised, message = refuse()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    did = [] if sys.argv[3] == "apart" else list(seen)
    print(json.dumps([raised, message, grown, did]), flush=True)
"""


class Victim:
    """A process that converts whatever lies in its folder, each time that it is told to."""

    def __init__(self, work: Path, mode: str) -> None:
        self.folder, self.out, self.cwd = work / "in", work / "out", work / "cwd"
        for path in (self.folder, self.cwd):
            path.mkdir()
        first = "folder: a tensor that no shard has"
        next(case for case in hostile_checkpoints() if case.name == first).build(self.folder)
        command = [sys.executable, "-c", _VICTIM, str(self.folder), str(self.out), mode]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.cwd
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        self._empty()

    def convert(self, case: Hostile) -> tuple[str, str, int, list[str]]:
        """Raised, message, KiB that its memory ever grew, what it did beside."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        case.build(self.folder)
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer: Any = json.loads(self._process.stdout.readline())
        self._empty()
        return tuple(answer)

    def _empty(self) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def end(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(params=["within", "apart"])
def victim(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Victim, str]]:
    victim = Victim(tmp_path, request.param)
    yield victim, request.param
    victim.end()


def test_every_hostile_checkpoint_is_refused_and_nothing_else_happens(
    victim: tuple[Victim, str],
) -> None:
    process, mode = victim
    cases = list(hostile_checkpoints())
    assert len(cases) >= 150
    assert len({case.name for case in cases}) == len(cases)
    for case in cases if mode == "within" else cases[::24]:
        raised, message, grown_kib, did = process.convert(case)
        assert issubclass(getattr(errors, raised, type(None)), case.error), (case.name, raised)
        assert message.isprintable()
        assert "Error(" not in message
        assert did == [], case.name
        assert grown_kib < (64 + 20) * 1024, case.name  # its input is up to 18 MiB
        assert not process.out.exists(), case.name
        assert list(process.cwd.iterdir()) == [], f"{case.name} made {CANARY}"
