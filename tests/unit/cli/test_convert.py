"""`sllm convert --quantize` before its process starts, and what it does with one that fails."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from serverlessllm.backends.inside.quantize.messages import (
    Advanced,
    Evaluation,
    QuantizeRequest,
    Report,
    TensorError,
)
from serverlessllm.checkpoint.quantized import Scheme
from serverlessllm.cli import quantize
from serverlessllm.cli.convert import _print_report, convert
from serverlessllm.cli.failure import Failure

REQUEST = QuantizeRequest(
    source="/nowhere",
    work="/nowhere",
    parent=os.getpid(),
    scheme=Scheme(name="int8", group_size=None),
)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": "int3"}, "one of int8, int4"),
        ({"quantize": "int4", "group_size": 24}, "one of 16, 32, 64, 128, 256"),
        ({"group_size": 32}, "go with --quantize"),
        ({"evaluate": True}, "go with --quantize"),
    ],
)
def test_wrong_options_are_a_usage_error_and_leave_nothing(options, said, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(Failure, match=said) as failed:
        convert(source, tmp_path / "out", **options)
    assert failed.value.exit_status == 2
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_library_is_told_with_the_way_out(monkeypatch):
    monkeypatch.setattr(quantize, "_NEEDED", ("msgspec", "no_such_library"))
    with pytest.raises(Failure, match="needs no_such_library") as failed:
        quantize.check_installed()
    assert failed.value.cure == "pip install 'serverlessllm[torch]'"


def test_the_work_folder_is_gone_afterwards_also_on_failure(tmp_path):
    with quantize.work_folder(tmp_path / "out") as (work, _):
        (work / "shard").write_bytes(b"x")
    assert not list(tmp_path.iterdir())
    with (
        suppress(KeyboardInterrupt),
        quantize.work_folder(tmp_path / "out") as (work, _),
    ):
        (work / "shard").write_bytes(b"x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_goes_first(tmp_path):
    left = tmp_path / ".out.quantizing" / "folder"
    left.mkdir(parents=True)
    (left / "shard").write_bytes(b"x")
    with quantize.work_folder(tmp_path / "out") as (work, _):
        assert not list(work.iterdir())


def test_two_runs_to_one_destination_are_told_apart(tmp_path):
    with (
        quantize.work_folder(tmp_path / "out") as (work, _),
        pytest.raises(Failure, match="another process is quantising"),
        quantize.work_folder(tmp_path / "out"),
    ):
        pass
    assert not work.exists()


def test_a_link_in_the_place_of_the_work_folder_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "folder").mkdir()
    (tmp_path / ".out.quantizing").symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"out\.quantizing"), quantize.work_folder(tmp_path / "out"):
        pass
    assert (elsewhere / "folder").exists()


@pytest.fixture
def lock(tmp_path) -> Iterator[int]:
    with quantize.work_folder(tmp_path / "out") as work:
        yield work.lock


def process_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Let this be run in the place of the quantising process."""
    (tmp_path / "stand_in.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(quantize, "_MODULE", "stand_in")


def test_a_process_that_dies_is_told_with_its_last_words(monkeypatch, tmp_path, lock):
    script = "import os, sys\nsys.stderr.write('no' * 9999 + ' memory left')\nos.abort()"
    process_that(monkeypatch, tmp_path, script)
    with pytest.raises(Failure, match=r"no memory left$") as failed:
        quantize.quantize(REQUEST, lock, lambda _: None)
    assert len(str(failed.value)) < 2100


def test_its_refusal_is_ours(monkeypatch, tmp_path, lock):
    script = 'print(\'{"type":"failed","message":"too odd"}\')'
    process_that(monkeypatch, tmp_path, script)
    with pytest.raises(Failure, match=r"^too odd$"):
        quantize.quantize(REQUEST, lock, lambda _: None)


def test_it_never_outlives_who_asked(monkeypatch, tmp_path, lock):
    script = (
        "import os, time\n"
        'print(\'{"type":"advanced","stage":"quantising","done":%d,"total":9}\' '
        "% os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    process_that(monkeypatch, tmp_path, script)
    seen: list[int] = []

    def interrupted(at: Advanced) -> None:
        seen.append(at.done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.quantize(REQUEST, lock, interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


def test_others_are_kept_out_while_the_process_lives(monkeypatch, tmp_path):
    """Also when whoever started it was killed: its descriptor of the lock is closed here."""
    script = (
        "import sys\n"
        'print(\'{"type":"advanced","stage":"quantising","done":1,"total":9}\', flush=True)\n'
        "sys.stdin.read()\n"
        'print(\'{"type":"failed","message":"done"}\')\n'
    )
    process_that(monkeypatch, tmp_path, script)
    folder = tmp_path / ".out.quantizing"
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    refused: list[str] = []

    def killed(_at: Advanced) -> None:
        os.close(lock)
        with pytest.raises(Failure) as failed, quantize.work_folder(tmp_path / "out"):
            pass
        refused.append(str(failed.value))

    with pytest.raises(Failure, match=r"^done$"):
        quantize.quantize(REQUEST, lock, killed)
    assert refused == [f"another process is quantising to {tmp_path / 'out'}"]
    with quantize.work_folder(tmp_path / "out") as work:
        assert work.path.is_dir()


def test_the_report_for_people(capsys):
    _print_report(
        Report(
            scheme="int4",
            group_size=32,
            library="lib 1",
            error=0.0724,
            worst=TensorError(name="layers.3.w", error=0.0823),
            quantized=("a", "b"),
            kept=("c",),
            source_bytes=1 << 20,
            tensor_bytes=1 << 18,
            evaluation=Evaluation(tokens=84, kl_mean=0.36, kl_max=2.1, top1_agreement=0.798),
        )
    )
    assert capsys.readouterr().out.splitlines() == [
        "int4, groups of 32, by lib 1: 1.0 MiB of tensors → 256.0 KiB (25%)",
        "2 weights of the layers quantised, 1 tensor kept as they were",
        "relative error 7.24%, worst 8.23% (layers.3.w)",
        (
            "against the original on 84 tokens: same first choice 79.8%, "
            "KL divergence 0.3600 (worst 2.1000)"
        ),
    ]
