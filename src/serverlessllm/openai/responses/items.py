"""Items of a response: what a client sends, what is kept, and what an answer is made of."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from serverlessllm.openai.chats import TokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_text"):
    text: str


class InputImage(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_image"):
    image_url: str
    detail: str = "auto"


class InputAudio(Struct, frozen=True, kw_only=True, tag_field="type", tag="input_audio"):
    data: str
    format: str


class OutputText(Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: tuple[()] = ()
    """Nothing here cites: there are no built-in tools."""
    logprobs: tuple[TokenLogprob, ...] = ()


class Refusal(Struct, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    refusal: str


Content = InputText | InputImage | InputAudio | OutputText | Refusal
OutputPart = OutputText | Refusal


class Message(Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    id: str
    role: Literal["user", "system", "developer", "assistant"]
    status: Status = "completed"
    content: tuple[Content, ...]


class FunctionCall(Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status = "completed"


class FunctionCallOutput(
    Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call_output"
):
    id: str
    call_id: str
    output: str | tuple[InputText | InputImage | InputAudio, ...]
    status: Status = "completed"


class SummaryText(Struct, frozen=True, kw_only=True, tag_field="type", tag="summary_text"):
    text: str


class ReasoningText(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str


class Reasoning(Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    summary: tuple[SummaryText, ...] = ()
    content: tuple[ReasoningText, ...] = ()
    status: Status = "completed"


class ItemReference(Struct, frozen=True, kw_only=True):
    """An item that is kept here already."""

    id: str


Item = Message | FunctionCall | FunctionCallOutput | Reasoning
OutputItem = Message | FunctionCall | Reasoning
