"""A machine for agents: real store, tiers and backends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serverlessllm.testing.agents import Machine
from serverlessllm.testing.agents import machine as machine_at


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    async with machine_at(tmp_path) as machine:
        yield machine
