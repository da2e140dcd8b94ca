"""The child that reads a pickle: what it may not do, and that it is not believed."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import pytest

from serverlessllm.checkpoint.pickles import sandbox
from serverlessllm.checkpoint.pickles.interpreter import PICKLE_BYTES_MAX, read_state_dict
from serverlessllm.checkpoint.pickles.sandbox import decode_answer, read_state_dict_apart
from serverlessllm.core.errors import CheckpointError, SourceUnavailable, UnsupportedCheckpoint
from serverlessllm.testing.hostile_pickles import hostile_pickles
from serverlessllm.testing.torch_files import state_dict, tensor

PICKLE = state_dict({"a": tensor(), "b": tensor()})

_CONFINED = """
import os, socket, sys
from serverlessllm.checkpoint.pickles import confine
{before}
filtered = confine.confine(os.getppid())
os.write(1, b"filtered" if filtered else b"limited")
try:
    {attempt}
except OSError:
    os._exit(7)
os.write(1, b" and free")
"""


def attempt(code: str, *, before: str = "") -> subprocess.CompletedProcess[bytes]:
    """Confine a process, then let it try something: exit status 7 if the kernel said no."""
    script = _CONFINED.format(before=before, attempt=code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)


ATTEMPTS = {
    "read a file": "os.open('/etc/passwd', os.O_RDONLY)",
    "write a file": "os.open('canary', os.O_WRONLY | os.O_CREAT)",
    "write to a descriptor": "os.write(2, b'x')",
    "list a folder": "os.listdir('/')",
    "remove a file": "os.unlink('canary')",
    "open a socket": "socket.socket()",
    "start a process": "os.fork()",
    "become another program": "os.execv('/bin/true', ['true'])",
    "signal a process": "os.kill(os.getppid(), 0)",
    "map executable memory": "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC)",
}


@pytest.mark.parametrize("code", ATTEMPTS.values(), ids=ATTEMPTS)
def test_a_confined_process_can_do_nothing_else(code: str) -> None:
    ended = attempt(code, before="import mmap")
    assert b"free" not in ended.stdout
    if ended.stdout == b"limited":  # this kernel has no seccomp, or forbids it to us
        return
    assert ended.returncode < 0, ended.stderr


def test_without_seccomp_the_limits_hold() -> None:
    before = "confine._MACHINES = {}"
    opened = attempt("os.open('/etc/passwd', os.O_RDONLY)", before=before)
    assert (opened.stdout, opened.returncode) == (b"limited", 7)
    greedy = attempt("bytearray(1 << 30)", before=before)
    assert greedy.stdout == b"limited"
    assert b"MemoryError" in greedy.stderr


def test_an_orphan_does_not_begin() -> None:
    script = "from serverlessllm.checkpoint.pickles.child import main; main(-1)"
    ended = subprocess.run(
        [sys.executable, "-c", script], input=PICKLE, capture_output=True, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stdout == b""


def test_the_answer_is_the_interpreters() -> None:
    assert read_state_dict_apart(PICKLE) == read_state_dict(PICKLE)


SELECTED = [
    case
    for case in hostile_pickles()
    if case.name in {"REDUCE os system", "opcode EXT4", "a bomb of dicts", "nothing", "no opcode"}
]


@pytest.mark.parametrize("case", SELECTED, ids=[case.name for case in SELECTED])
def test_a_refusal_crosses_with_its_type_and_reason(case: object) -> None:
    assert isinstance(case, tuple)
    _, data, error = case
    with pytest.raises(error) as here:
        read_state_dict(data)
    with pytest.raises(error) as apart:
        read_state_dict_apart(data)
    assert apart.value.message == here.value.message
    assert type(apart.value) is type(here.value)


def test_too_long_a_pickle_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CheckpointError, match="more than"):
        read_state_dict_apart(bytes(PICKLE_BYTES_MAX + 1))
    with pytest.raises(SourceUnavailable, match="cannot be started"):
        read_state_dict_apart(PICKLE)


HEAD = '{"tensors":1,"wrapped_in":[]}\n'
VIEW = '["a","F32","0",16,0,[4],[1]]\n'
LIES = {
    "no JSON": "hello",
    "nothing": "",
    "no object": "[]\n",
    "an unknown field": '{"tensors":0,"more":1}\n',
    "a negative count": '{"tensors":-1}\n',
    "a count of too many": '{"tensors":200001}\n' + VIEW,
    "one tensor more": HEAD + VIEW + VIEW,
    "one tensor less": HEAD,
    "an empty tensor": HEAD + "\n",
    "a view of other parts": HEAD + '["a"]\n',
    "a number that is text": HEAD + VIEW.replace("16", '"16"'),
    "a negative number": HEAD + VIEW.replace(",0,", ",-1,"),
    "a negative stride": HEAD + VIEW.replace("[1]", "[-1]"),
    "a number over 63 bits": HEAD + VIEW.replace("[4]", "[9223372036854775808]"),
    "a number of 5,000 digits": HEAD + VIEW.replace("[4]", f"[{'9' * 5000}]"),
    "a fraction": HEAD + VIEW.replace(",0,", ",0.5,"),
    "a type of half a byte": HEAD + VIEW.replace("F32", "F4"),
    "a type of no tensor": HEAD + VIEW.replace("F32", "F33"),
    "a name that acts on a terminal": HEAD + VIEW.replace('"a"', r'"\u001b[2J"'),
    "a name of half a character": HEAD + VIEW.replace('"a"', r'"\ud800"'),
    "a storage with a long name": HEAD + VIEW.replace('"0"', f'"{"0" * 65}"'),
    "a long line": HEAD + VIEW.replace("[4]", f"[4{',1' * 5000}]"),
    "a cut answer": HEAD + VIEW[:-1],
}


def speaking(answer: str) -> str:
    return f"import sys; sys.stdout.write({answer!r})"


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_child_that_lies_is_not_believed(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CHILD", speaking(lie))
    with pytest.raises(CheckpointError):
        read_state_dict_apart(PICKLE)


def test_an_answer_takes_no_more_memory_than_its_tensors() -> None:
    lie = b'{"tensors":200000}\n' + b"\n" * (32 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="of no use"):
            decode_answer(lie)
        assert tracemalloc.get_traced_memory()[1] < (64 + 16) << 20
    finally:
        tracemalloc.stop()


def test_what_a_child_says_cannot_act_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said = '{"refused":"\\u001b[2J' + "x" * 5000 + '","unsupported":true}'
    monkeypatch.setattr(sandbox, "_CHILD", speaking(said))
    with pytest.raises(UnsupportedCheckpoint) as refused:
        read_state_dict_apart(PICKLE)
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 2000


def test_a_child_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CHILD", "import signal; signal.pause()")
    monkeypatch.setattr(sandbox, "WALL_S", 0.2)
    with pytest.raises(CheckpointError, match="was not read within"):
        read_state_dict_apart(PICKLE)


def test_a_child_that_talks_without_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    talking = "import os\nwhile True: os.write(1, bytes(1 << 16))"
    monkeypatch.setattr(sandbox, "_CHILD", talking)
    monkeypatch.setattr(sandbox, "ANSWER_BYTES_MAX", 1 << 18)
    with pytest.raises(CheckpointError, match="describes more than"):
        read_state_dict_apart(PICKLE)


def test_it_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    look = (
        "import json, os; fds = [int(n) for n in os.listdir('/proc/self/fd')]; "
        "found = sorted(os.environ) + [os.readlink(f'/proc/self/fd/{n}') for n in fds "
        "if n > 2 and os.path.exists(f'/proc/self/fd/{n}')]; "
        "print(json.dumps({'refused': ' '.join(found) + ' in ' + os.getcwd()}))"
    )
    monkeypatch.setattr(sandbox, "_CHILD", look)
    with pytest.raises(CheckpointError) as told:
        read_state_dict_apart(PICKLE)
    assert "secret" not in told.value.message
    assert "HF_TOKEN" not in told.value.message
    assert told.value.message.endswith(" in /")
