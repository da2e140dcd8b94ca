"""Requests, checked before any backend sees them; the backend gets the original bytes.

The structs are what the API documents (`openai/document`): msgspec checks them in C while it
parses. What one field says about another is checked in Python (`parse`), and only where that field
is there. Fields that no struct names pass through unread.
"""

from serverlessllm.openai.request.chat import ChatRequest
from serverlessllm.openai.request.completion import CompletionRequest
from serverlessllm.openai.request.embeddings import EmbeddingsRequest
from serverlessllm.openai.request.fields import ParsedRequest
from serverlessllm.openai.request.parse import parse_chat, parse_completion, parse_embeddings
from serverlessllm.openai.request.read import check_content_type, read_request

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingsRequest",
    "ParsedRequest",
    "check_content_type",
    "parse_chat",
    "parse_completion",
    "parse_embeddings",
    "read_request",
]
