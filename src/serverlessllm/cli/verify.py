"""`sllm verify`: prove that a checkpoint's bytes are what its index says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from serverlessllm.cli import options
from serverlessllm.cli.failure import Failure
from serverlessllm.cli.local import Checkpoint, LocalCheckpoint, open_local

if TYPE_CHECKING:
    from serverlessllm.checkpoint.reader import BadChunk, Findings


def verify(
    checkpoint: Checkpoint,
    id: Annotated[  # noqa: A002 - the option's name
        str | None,
        typer.Option(
            "--id",
            help="The checkpoint's id: proves the index too. [default: what model.journal beside "
            "it says]",
            show_default=False,
        ),
    ] = None,
    data_dir: options.DataDir = None,
    config: options.Config = None,
    json: options.Json = False,
) -> None:
    """Read a whole checkpoint and name all that is damaged."""
    import time

    from serverlessllm.checkpoint.reader import examine
    from serverlessllm.core.errors import CheckpointError

    if id is not None and not re.fullmatch(r"[0-9a-f]{64}", id):
        raise Failure(f"--id {id}: an id is 64 hexadecimal digits", exit_status=2)
    found = open_local(checkpoint, data_dir, config)
    if not found.bin_path.exists():
        raise Failure(f"{found.bin_path}: no such file", "pull or convert the model again")
    expected, authority = _expected_id(found, id)
    started_s = time.monotonic()
    try:
        findings = examine(found.bin_path, found.contents)
    except CheckpointError as error:
        raise Failure(error.message) from error
    except OSError as error:
        raise Failure(f"{found.bin_path}: {error.strerror}") from error
    seconds = time.monotonic() - started_s
    problem = None
    if expected is not None and expected != found.id:
        problem = f"its id is {found.id}, but {authority} says {expected}"
    if json:
        _print_json(found, findings, problem, authority, seconds)
    elif problem is None and findings.whole:
        _print_whole(found, authority, seconds)
    else:
        _print_damage(found, findings, problem)
    if problem is not None or not findings.whole:
        damaged = found.index_path if findings.whole else found.bin_path
        raise Failure(
            f"{damaged} is damaged, or does not belong to this checkpoint",
            "remove both files and pull or convert the model again",
        )


def _expected_id(found: LocalCheckpoint, given: str | None) -> tuple[str | None, str | None]:
    """The id that the index must have, and who says so; None where nobody does."""
    from serverlessllm.checkpoint.journal import JOURNAL_NAME, finished_id

    if given is not None:
        return given, "--id"
    noted = finished_id(found.index_path.with_name(JOURNAL_NAME))
    return (noted, JOURNAL_NAME) if noted is not None else (None, None)


def _print_whole(found: LocalCheckpoint, authority: str | None, seconds: float) -> None:
    from serverlessllm.core.units import format_size

    size_bytes = found.contents.size_bytes
    rate = format_size(size_bytes / seconds)
    print(f"{found.id}: {format_size(size_bytes)} verified in {seconds:.2f} s ({rate}/s)")
    if authority is None:
        print("the index itself is well-formed; --id ID proves that it is the one you mean")


def _print_damage(found: LocalCheckpoint, findings: Findings, problem: str | None) -> None:
    if problem is not None:
        print(f"{found.index_path.name}: {problem}")
    expected_bytes = found.contents.size_bytes
    if findings.size_bytes != expected_bytes:
        print(
            f"{found.bin_path.name}: {findings.size_bytes} bytes where the index says "
            f"{expected_bytes}: it was cut off, added to, or belongs to another index"
        )
    for bad in findings.bad_chunks:
        print(
            f"chunk {bad.number} (bytes {bad.offset} to {bad.offset + bad.size_bytes}) "
            f"{bad.problem}: {_hit(bad)}"
        )
    more = findings.bad_chunks_count - len(findings.bad_chunks)
    if more:
        print(f"and {more} more chunks")


def _hit(bad: BadChunk) -> str:
    """What a bad chunk may have damaged: which of its bytes are wrong, no digest tells."""
    if not bad.parts:
        return "only padding"
    more = bad.parts_count - len(bad.parts)
    return ", ".join(bad.parts) + (f" and {more} more" if more else "")


def _print_json(
    found: LocalCheckpoint,
    findings: Findings,
    problem: str | None,
    authority: str | None,
    seconds: float,
) -> None:
    from serverlessllm.cli.output import print_json

    print_json(
        {
            "checkpoint": found.id,
            "whole": problem is None and findings.whole,
            "index_problem": problem,
            "index_checked_by": authority,
            "size_bytes": findings.size_bytes,
            "excess_bytes": findings.excess_bytes,
            "bad_chunks": findings.bad_chunks,
            "bad_chunks_count": findings.bad_chunks_count,
            "seconds": seconds,
        }
    )
