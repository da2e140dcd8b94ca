"""What any header from a stranger must stay within, whatever its format."""

from __future__ import annotations

from collections.abc import Iterable

from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.units import MIB, TIB

INDEX_BYTES_MAX = 64 * MIB
BIN_BYTES_MAX = 64 * TIB
TENSORS_MAX = 200_000
NAME_BYTES_MAX = 512
CHUNK_BYTES_MIN = 4096
CHUNK_BYTES_MAX = 64 * MIB
ALIGNMENT_BYTES_MAX = 64 * 1024

Span = tuple[str, int, int]
"""Name, offset, size in bytes."""


def check_text(text: str, what: str) -> None:
    """Refuse what is empty, over 512 bytes, or would act on a terminal or a log.

    Raises:
        CheckpointError: it is; `what` says whose text it was.
    """
    if not text:
        raise CheckpointError(f"{what} is empty")
    if not text.isprintable():
        raise CheckpointError(f"{what} {text[:80]!r} has characters that do not print")
    if len(text.encode()) > NAME_BYTES_MAX:
        raise CheckpointError(f"{what} {text[:80]!r}… is longer than {NAME_BYTES_MAX} bytes")


def printable(text: str, chars_max: int = 500) -> str:
    """What a stranger may have had a part in, for a message: cut, and with nothing that acts."""
    text = text[:chars_max]
    return text if text.isprintable() else ascii(text)[:chars_max]


def check_count(count: int, what: str, limit: int = TENSORS_MAX) -> None:
    """Refuse more of something than any real model has."""
    if not 0 <= count <= limit:
        raise CheckpointError(f"{count} {what}, more than {limit}")


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def check_spans(spans: Iterable[Span], size_bytes: int, alignment_bytes: int) -> None:
    """Check that spans are sorted, aligned, disjoint and inside a file of `size_bytes`.

    Raises:
        CheckpointError: naming the first span that is not.
    """
    end, before = 0, ""
    for name, offset, size in spans:
        if offset < 0 or size < 0 or offset + size > size_bytes:
            raise CheckpointError(
                f"{name[:80]!r}: bytes {offset} to {offset + size} are outside of the file's "
                f"{size_bytes}"
            )
        if offset % alignment_bytes:
            raise CheckpointError(
                f"{name[:80]!r}: offset {offset} is not a multiple of {alignment_bytes}"
            )
        if offset < end:
            raise CheckpointError(f"{name[:80]!r} overlaps {before[:80]!r}, or is out of order")
        end, before = offset + size, name
