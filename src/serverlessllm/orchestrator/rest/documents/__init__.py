"""`/openapi.json`, and `/docs` that shows it."""

from serverlessllm.orchestrator.rest.documents.describe import describe, described_paths
from serverlessllm.orchestrator.rest.documents.pages import Documents

__all__ = ["Documents", "describe", "described_paths"]
