"""Sizes and durations as people write them. Names carry the unit: `size_bytes`, `eta_s`."""

from __future__ import annotations

import re
import sys

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

FOREVER_S = -1.0
"""A duration that does not end, as in `keep_alive: -1`."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|[KMGT]i?B?)?", re.IGNORECASE)
_SIZE_UNITS = {"b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_DURATION_CHARS_MAX = 64
"""A client's megabytes of "1s1s1s…" would keep the event loop busy for seconds."""
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size_bytes(text: str | int) -> int:
    """`8GiB`, `512M`, `1.5 GB`, `4096` → bytes; prefixes are binary in every spelling."""
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"size {text}: must not be negative")
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"size {text!r}: write a number and a unit, such as 8GiB or 512MiB")
    number, unit = match.groups()
    return int(float(number) * _SIZE_UNITS[(unit or "b")[0].lower()])


def format_size(size_bytes: float) -> str:
    """A size for people: `93.8 MiB`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_count(number: int, noun: str) -> str:
    """`1 model`, `2 models`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def parse_duration_s(value: str | float) -> float:
    """`300`, `"5m"`, `"1h30m"`, `0`, `-1` (forever) → seconds.

    Raises:
        ValueError: not a number, not a duration string, not finite, or negative but not -1.
    """
    if isinstance(value, bool):
        raise ValueError("duration: a number of seconds or a string such as '5m', not a boolean")
    if isinstance(value, str):
        text = value.strip()
        if text in {"-1", "forever"}:
            return FOREVER_S
        matches = list(_DURATION.finditer(text[:_DURATION_CHARS_MAX]))
        if not matches or "".join(m.group() for m in matches) != text:
            shown = value[:_DURATION_CHARS_MAX]
            raise ValueError(
                f"duration {shown!r}: write seconds, '5m', '1h30m', 0, or -1 (forever)"
            )
        return sum(float(m[1]) * _DURATION_UNITS[m[2] or "s"] for m in matches)
    if value == FOREVER_S:
        return FOREVER_S
    if not 0 <= value <= sys.float_info.max:  # as an integer, JSON's may be larger still
        raise ValueError("duration: must be 0 or more seconds, or -1 (forever)")
    return float(value)


def format_duration(duration_s: float) -> str:
    """A duration for people: `forever`, `850 ms`, `12.0 s`, `5m00s`, `2h05m`, `30d00h`."""
    if duration_s < 0:
        return "forever"
    if duration_s < 1:
        return f"{duration_s * 1000:.0f} ms"
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{minutes:02d}m"
    # From here an hour is the grain: a key made for 30 days shows `30d00h` a second later.
    days, hours = divmod(round(duration_s / 3600), 24)
    return f"{days}d{hours:02d}h"
