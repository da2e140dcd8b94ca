from __future__ import annotations

import pytest

from serverlessllm.metadata.registry import Registry
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.testing.clock import VirtualClock
from serverlessllm.testing.metadata import FakeMetadata


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def store(clock: VirtualClock) -> FakeMetadata:
    return FakeMetadata(clock)


@pytest.fixture
def registry(store: FakeMetadata) -> Registry:
    return Registry(store, MetadataSettings(jobs_kept_max=3))
