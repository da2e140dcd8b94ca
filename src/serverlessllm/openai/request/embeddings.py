"""`POST /v1/embeddings`."""

from __future__ import annotations

from typing import Literal

import msgspec

from serverlessllm.openai.request.fields import (
    AtLeastOne,
    ParsedRequest,
    RequestFields,
    at_most,
    parsed,
)
from serverlessllm.openai.request.prompts import Inputs, check_texts
from serverlessllm.openai.request.read import read_request
from serverlessllm.openai.settings import RequestLimits


class EmbeddingsRequest(RequestFields, frozen=True, kw_only=True):
    """Texts whose meaning is wanted as vectors."""

    input: Inputs
    """A text, several, token ids, or several arrays of them; none of them empty."""
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers, or base64 of little-endian 32-bit floats."""
    dimensions: AtLeastOne | None = None
    """Length of the vectors, for models that can shorten them."""


_decoder = msgspec.json.Decoder(EmbeddingsRequest)


def parse_embeddings(body: bytes, limits: RequestLimits) -> ParsedRequest:
    """Check an embeddings request; raises as `parse_chat`."""
    embeddings = read_request(_decoder, body, limits)
    check_texts("input", embeddings.input, limits, empty=False)
    if embeddings.dimensions is not None:
        at_most("dimensions", embeddings.dimensions, limits.dimensions_max)
    return parsed(embeddings)
