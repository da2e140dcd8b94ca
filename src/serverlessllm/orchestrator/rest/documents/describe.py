"""Everything that this process serves, as one OpenAPI document."""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from serverlessllm import __version__
from serverlessllm.openai.document import build_document
from serverlessllm.openai.errors import ErrorBody
from serverlessllm.openai.settings import RequestLimits
from serverlessllm.orchestrator.rest.documents.dialects import MESSAGES, RESPONSES
from serverlessllm.orchestrator.rest.documents.inference import INFERENCE
from serverlessllm.orchestrator.rest.documents.management import MANAGEMENT
from serverlessllm.orchestrator.rest.documents.server import SERVER
from serverlessllm.orchestrator.rest.loading import Progress

_TAGS = {
    "Inference": "What models do.",
    "Responses": "What models do, as OpenAI's newer API asks for it.",
    "Messages": "What models do, as Anthropic's API asks for it.",
    "Models": "Which models there are.",
    "Management": "What an operator does: needs a key of the scope `admin`.",
    "Server": "How this process is.",
}
_OPERATIONS = (*INFERENCE, *RESPONSES, *MESSAGES, *MANAGEMENT, *SERVER)


class AnyError(ErrorBody, frozen=True):
    """Every answer that is an error."""

    loading: Progress | UnsetType = UNSET
    """How far the load is, of `model_loading`."""


def describe(limits: RequestLimits) -> bytes:
    """The document, as JSON; some 50 ms of work."""
    return build_document(
        _OPERATIONS, tags=_TAGS, limits=limits, version=__version__, error=AnyError
    )


def described_paths() -> frozenset[tuple[str, str]]:
    """(path, method) of every operation that the document has."""
    return frozenset((operation.path, operation.method) for operation in _OPERATIONS)
