from collections.abc import Iterator

import pytest

from serverlessllm.testing.s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 service, shared by the tests of this folder: each uses a folder of its own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server
