"""The fake is held to what the real adapters are held to."""

from __future__ import annotations

import pytest

from serverlessllm.metadata.base import Metadata
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.contracts.metadata import MetadataContract
from serverlessllm.testing.metadata import FakeMetadata


class FakeHarness:
    ttl_s = 10.0

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.store = FakeMetadata(self.clock, changes_kept_max=50)

    def open(self) -> Metadata:
        return self.store.another()

    async def pass_time(self, seconds: float) -> None:
        await self.clock.advance(seconds)

    async def compact(self) -> None:
        for _ in range(50):
            await self.store.put("noise", b"")


class TestFake(MetadataContract):
    @pytest.fixture
    def harness(self) -> FakeHarness:
        return FakeHarness()
