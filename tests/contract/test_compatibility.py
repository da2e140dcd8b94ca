"""The table of `docs/compatibility.md` says what the backends do."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from serverlessllm.testing.compatibility.engines import BACKENDS
from serverlessllm.testing.compatibility.page import BEHAVIOURS, ask_all, read, render

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


@pytest.mark.parametrize("backend", BACKENDS)
async def test_the_page_says_what_the_backend_does(backend: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        found = await ask_all(backend, Path(folder))
    said = read(PAGE.read_text(), backend)
    assert said == found, "run: python -m serverlessllm.testing.compatibility"


def test_the_page_is_as_it_was_written() -> None:
    page = PAGE.read_text()
    columns = [read(page, backend) for backend in BACKENDS]
    assert all(len(column) == len(BEHAVIOURS) for column in columns)
    assert render(columns) == page, "run: python -m serverlessllm.testing.compatibility"
