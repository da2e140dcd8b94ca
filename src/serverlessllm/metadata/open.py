"""The metadata store of a URL."""

from __future__ import annotations

from pathlib import Path

from serverlessllm.core.clock import Clock
from serverlessllm.metadata.base import Metadata
from serverlessllm.metadata.settings import MetadataSettings
from serverlessllm.metadata.sqlite import SqliteMetadata


def open_metadata(url: str, settings: MetadataSettings, clock: Clock) -> Metadata:
    """The adapter for `url`: `sqlite:///absolute/path` or `sqlite:relative/path`.

    Nothing is opened yet: the first call does that. Close it when done.

    Raises:
        ValueError: a URL that this build has no adapter for.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite":
        path = rest.removeprefix("//")
        if not path or (rest.startswith("//") and not path.startswith("/")):
            raise ValueError(f"metadata URL {url!r}: write sqlite:///absolute/path/to/file")
        return SqliteMetadata(Path(path), settings, clock)
    raise ValueError(
        f"metadata URL {url!r}: this build has only sqlite (sqlite:///path/to/metadata.db)"
    )
