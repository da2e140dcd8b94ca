"""SQLite, on a real file that several clients share, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.metadata.sqlite import SqliteMetadata
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.contracts.metadata import MetadataContract


class SqliteHarness:
    ttl_s = 10.0

    def __init__(self, path: Path) -> None:
        self.clock = VirtualClock()
        self.path = path
        self.clients: list[SqliteMetadata] = []
        # The contract is about results, not about how busy the machine is that tests run on.
        self.settings = MetadataSettings(
            changes_kept_max=50, changes_batch_max=7, call_timeout_s=20
        )

    def open(self) -> SqliteMetadata:
        self.clients.append(SqliteMetadata(self.path, self.settings, self.clock, boot="contract"))
        return self.clients[-1]

    async def pass_time(self, seconds: float) -> None:
        await self.clock.advance(seconds)

    async def compact(self) -> None:
        client = self.open()
        for _ in range(50):
            await client.put("noise", b"")


class TestSqlite(MetadataContract):
    @pytest.fixture
    async def harness(self, tmp_path: Path) -> AsyncIterator[SqliteHarness]:
        harness = SqliteHarness(tmp_path / "metadata.db")
        yield harness
        for client in harness.clients:
            await client.close()
