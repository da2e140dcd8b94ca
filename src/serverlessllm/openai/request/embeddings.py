"""`POST /v1/embeddings`."""

from __future__ import annotations

from typing import Literal

from serverlessllm.openai.request.fields import AtLeastOne, RequestFields
from serverlessllm.openai.request.prompts import Inputs


class EmbeddingsRequest(RequestFields, frozen=True, kw_only=True):
    """Texts whose meaning is wanted as vectors."""

    input: Inputs
    """A text, several, token ids, or several arrays of them; none of them empty."""
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers, or base64 of little-endian 32-bit floats."""
    dimensions: AtLeastOne | None = None
    """Length of the vectors, for models that can shorten them."""
