"""The OpenAPI document: written from the structs that read requests and write answers."""

from serverlessllm.openai.document.build import build_document
from serverlessllm.openai.document.operation import Answer, Operation, Parameter

__all__ = ["Answer", "Operation", "Parameter", "build_document"]
