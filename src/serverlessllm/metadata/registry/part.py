"""What the parts of the registry have in common."""

from __future__ import annotations

from serverlessllm.metadata.base import Metadata
from serverlessllm.metadata.settings import MetadataSettings


class Part:
    """Typed verbs over one metadata store."""

    def __init__(self, metadata: Metadata, settings: MetadataSettings) -> None:
        self._metadata = metadata
        self._settings = settings
