"""A message's request as a chat, and a chat's complaint as one about the message's request."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from serverlessllm.openai.chats import (
    CalledFunction,
    Chat,
    ChatMessage,
    ChatRequest,
    CountRequest,
    Failure,
    Function,
    ImagePart,
    ImageURL,
    NamedFunction,
    Part,
    ResponseFormat,
    Schema,
    StreamOptions,
    TextPart,
    ToolCall,
    ToolChoice,
    in_own_words,
    said_plainly,
    write_chat,
)
from serverlessllm.openai.chats import Tool as ChatTool
from serverlessllm.openai.messages.blocks import Image, Text, ToolResult, ToolUse, Turn
from serverlessllm.openai.messages.request import Create, Prompt, Tool

_tool_path = re.compile(r"(tools\[\d+\])\.function(?:\.(parameters))?\b")
_RENAMED = {
    "max_completion_tokens": "max_tokens",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
    "user": "metadata.user_id",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(create: Create) -> Chat:
    """The chat that is asked in the message's place."""
    prompt = create.prompt
    messages, places = _messages(prompt)
    begun = messages[-1].role == "assistant" and not messages[-1].tool_calls
    request = ChatRequest(
        model=prompt.model,
        messages=messages,
        stream=create.stream,
        stream_options=StreamOptions(include_usage=True) if create.stream else None,
        max_completion_tokens=create.max_tokens,
        temperature=create.temperature,
        top_p=create.top_p,
        top_k=create.top_k,
        stop=create.stop_sequences,
        tools=tuple(map(_tool, prompt.tools)),
        tool_choice=_choice(prompt),
        parallel_tool_calls=_parallel(prompt),
        response_format=_format(prompt),
        reasoning_effort=prompt.effort,
        user=create.user,
        add_generation_prompt=not begun,
        continue_final_message=begun,
    )
    return Chat(body=write_chat(request, create.extras), places=places)


def to_count(prompt: Prompt) -> Chat:
    """What `/v1/tokenize` is asked to count the tokens of."""
    messages, places = _messages(prompt)
    request = CountRequest(
        model=prompt.model, messages=messages, tools=tuple(map(_tool, prompt.tools))
    )
    return Chat(body=msgspec.json.encode(request), places=places)


def to_own_words(failure: Failure, chat: Chat) -> Failure:
    """What the chat complained of, by the name that this API has for it."""
    return in_own_words(failure, chat, "messages", _own_param)


def _own_param(param: str) -> str:
    head, dot, rest = param.partition(".")
    if head == "response_format":
        return "output_config.format"
    if head in _RENAMED:
        return f"{_RENAMED[head]}{dot}{rest}"
    return _tool_path.sub(lambda m: f"{m[1]}.input_schema" if m[2] else m[1], param)


def _messages(prompt: Prompt) -> tuple[tuple[ChatMessage, ...], tuple[str, ...]]:
    """The chat's messages, and where each comes from."""
    written: list[tuple[ChatMessage, str]] = []
    if prompt.system:
        written.append((ChatMessage(role="system", content=prompt.system), "system"))
    for number, turn in enumerate(prompt.turns):
        place = f"messages[{number}]"
        if any(isinstance(block, ToolResult) for block in turn.blocks):
            place += ".content"
        written += ((message, place) for message in _turn(turn))
    return tuple(message for message, _ in written), tuple(place for _, place in written)


def _turn(turn: Turn) -> Iterable[ChatMessage]:
    if turn.role == "assistant":
        calls = tuple(_call(block) for block in turn.blocks if isinstance(block, ToolUse))
        text = "".join(block.text for block in turn.blocks if isinstance(block, Text))
        yield ChatMessage(
            role="assistant", content=None if calls and not text else text, tool_calls=calls
        )
        return
    if turn.role == "system":
        texts = (block.text for block in turn.blocks if isinstance(block, Text))
        yield ChatMessage(role="system", content="\n\n".join(texts))
        return
    # The tools' results answer the turn before, so they come first. Their messages are text:
    # images that a tool found follow as the user's.
    parts: list[Part] = []
    for block in turn.blocks:
        if isinstance(block, ToolResult):
            text = "".join(part.text for part in block.content if isinstance(part, Text))
            yield ChatMessage(role="tool", content=text, tool_call_id=block.tool_use_id)
            parts += (_part(part) for part in block.content if isinstance(part, Image))
        elif isinstance(block, Text | Image):
            parts.append(_part(block))
    if parts or not turn.blocks:
        yield ChatMessage(role="user", content=said_plainly(parts))


def _call(block: ToolUse) -> ToolCall:
    arguments = msgspec.json.encode(block.input).decode()
    return ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=arguments))


def _part(block: Text | Image) -> Part:
    if isinstance(block, Text):
        return TextPart(text=block.text)
    return ImagePart(image_url=ImageURL(url=block.url))


def _tool(tool: Tool) -> ChatTool:
    return ChatTool(
        function=Function(
            name=tool.name,
            description=tool.description,
            parameters=msgspec.Raw(msgspec.json.encode(tool.input_schema)),
            strict=tool.strict,
        )
    )


def _choice(prompt: Prompt) -> str | ToolChoice | None:
    choice = prompt.choice
    if choice is None or not prompt.tools:
        return None
    if choice.type == "tool":
        return ToolChoice(function=NamedFunction(name=choice.name or ""))
    return _CHOICES[choice.type]


def _parallel(prompt: Prompt) -> bool | None:
    choice = prompt.choice
    if choice is None or not prompt.tools or choice.disable_parallel_tool_use is None:
        return None
    return not choice.disable_parallel_tool_use


def _format(prompt: Prompt) -> ResponseFormat | None:
    if prompt.schema is None:
        return None
    schema = Schema(
        name="answer", schema=msgspec.Raw(msgspec.json.encode(prompt.schema)), strict=True
    )
    return ResponseFormat(type="json_schema", json_schema=schema)
