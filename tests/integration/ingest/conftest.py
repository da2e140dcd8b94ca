from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from serverlessllm.testing.hub import HubServer
from serverlessllm.testing.ingestions import Cluster


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server: HubServer) -> HubServer:
    """The hub, with nothing in it and nothing wrong with it."""
    hub_server.reset()
    return hub_server


@pytest.fixture
async def cluster(tmp_path: Path, hub: HubServer) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(tmp_path, hub, stack)
