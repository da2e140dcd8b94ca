"""Where tokens stand in a text that they, more or less, are."""

from __future__ import annotations

from collections.abc import Sequence

_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
_GAP = 8
"""Characters that tokens which are no text by themselves may stand for."""


def token_offsets(text: str, tokens: Sequence[str], at: int) -> list[int]:
    """The place of each token, in characters, `text` standing at `at`. A token that is not in the
    text, as the one that a prompt silently begins with, has no width."""
    offsets = []
    place = 0
    for token in tokens:
        bare = token.lstrip()
        start = place
        if _UNREADABLE not in bare and not text.startswith(token, place):
            found = text.find(bare, place, place + len(bare) + _GAP) if bare else place
            start = max(place, found)
        offsets.append(at + start)
        for spelled in (token, bare):
            if text.startswith(spelled, start):
                place = start + len(spelled)
                break
    return offsets
