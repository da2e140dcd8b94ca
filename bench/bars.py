"""Horizontal bars as an SVG file: no plotting library is worth its environment for this."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_ROW, _BAR, _TOP, _LEFT, _WIDTH, _RIGHT = 30, 18, 66, 290, 420, 190
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_INK, _FAINT, _OURS, _THEIRS, _LIMIT = "#1f2328", "#59636e", "#0969da", "#afb8c1", "#cf222e"


class Bar(NamedTuple):
    """One row."""

    label: str
    value: float
    text: str
    """On the right."""
    ours: bool = False


def draw(title: str, subtitle: str, bars: Sequence[Bar], limit: float, limit_text: str) -> str:
    """The bars, longest first, with a line at `limit`."""
    ordered = sorted(bars, key=lambda bar: -bar.value)
    scale = _WIDTH / max(limit, *(bar.value for bar in ordered))
    bottom = _TOP + _ROW * len(ordered)
    width, height = _LEFT + _WIDTH + _RIGHT, bottom + 40
    at = _LEFT + limit * scale
    parts = [
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(20, 30, title, size=17, weight=600),
        _text(20, 50, subtitle, size=12, colour=_FAINT),
    ]
    for number, bar in enumerate(ordered):
        parts += _row(bar, _TOP + _ROW * number, scale)
    parts.append(
        f'<path d="M{at:.1f} {_TOP - 4}V{bottom + 4}" stroke="{_LIMIT}" stroke-dasharray="4 3"/>'
    )
    parts.append(_text(at, bottom + 22, limit_text, size=12, colour=_LIMIT, anchor="end"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return "\n".join((f'{head} font-family="{_FONT}">', *parts, "</svg>\n"))


def _row(bar: Bar, top: int, scale: float) -> tuple[str, str, str]:
    middle = top + _ROW / 2 + 4
    weight = 600 if bar.ours else 400
    colour = _OURS if bar.ours else _THEIRS
    shape = f'y="{top + (_ROW - _BAR) / 2}" width="{max(1.0, bar.value * scale):.1f}"'
    return (
        _text(_LEFT - 10, middle, bar.label, weight=weight, anchor="end"),
        f'<rect x="{_LEFT}" {shape} height="{_BAR}" rx="2" fill="{colour}"/>',
        _text(_LEFT + _WIDTH + 14, middle, bar.text, weight=weight),
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    weight: int = 400,
    colour: str = _INK,
    anchor: str = "start",
) -> str:
    look = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(text)}</text>'
