"""The picture in the documentation is the table in the code."""

from __future__ import annotations

import re
from pathlib import Path

from serverlessllm.core.lifecycle import TRANSITIONS

ARCHITECTURE = Path(__file__).parents[3] / "docs" / "architecture.md"


def test_the_diagram_has_every_transition_and_no_other() -> None:
    drawn = re.findall(r"^    (\w+) --> (\w+)$", ARCHITECTURE.read_text(), re.MULTILINE)
    assert set(drawn) == {(state, to) for state, row in TRANSITIONS.items() for to in row}
