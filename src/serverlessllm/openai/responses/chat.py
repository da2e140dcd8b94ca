"""A response's request as a chat, and a chat's complaint as one about the response's request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import msgspec

from serverlessllm.openai.chats import (
    AudioData,
    AudioPart,
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
    Tool,
    ToolCall,
    in_own_words,
    said_plainly,
    write_chat,
)
from serverlessllm.openai.chats import ToolChoice as ChatChoice
from serverlessllm.openai.responses.items import (
    Content,
    FunctionCall,
    FunctionCallOutput,
    InputAudio,
    InputImage,
    Item,
    Message,
    Reasoning,
    Refusal,
)
from serverlessllm.openai.responses.request import Create
from serverlessllm.openai.responses.tools import (
    AllowedTools,
    FunctionTool,
    JSONSchema,
    NamedTool,
    PlainText,
)

_tool_path = re.compile(r"(tools\[\d+\])\.function\b")
_RENAMED = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}


def to_chat(create: Create, history: Sequence[Item], items: Sequence[Item]) -> Chat:
    """`history` is what the previous response ended with, `items` the request's own with every
    reference resolved."""
    messages = _messages(create, history, items)
    tools, choice = _tools(create)
    request = ChatRequest(
        model=create.model,
        messages=messages.whole(),
        stream=create.stream,
        stream_options=StreamOptions(include_usage=True) if create.stream else None,
        max_completion_tokens=create.max_output_tokens,
        temperature=create.temperature,
        top_p=create.top_p,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=create.parallel_tool_calls if tools else None,
        response_format=_format(create),
        logprobs=create.logprobs,
        top_logprobs=create.top_logprobs or None,
        reasoning_effort=create.reasoning.effort,
        user=create.user,
    )
    return Chat(body=write_chat(request, create.extras), places=tuple(messages.places))


def to_count(create: Create, history: Sequence[Item], items: Sequence[Item]) -> Chat:
    """What `/v1/tokenize` is asked to count the tokens of."""
    messages = _messages(create, history, items)
    request = CountRequest(model=create.model, messages=messages.whole(), tools=_tools(create)[0])
    return Chat(body=msgspec.json.encode(request), places=tuple(messages.places))


def to_own_words(failure: Failure, chat: Chat) -> Failure:
    """What the chat complained of, by the name that this API has for it."""
    return in_own_words(failure, chat, "input", _own_param)


def _own_param(param: str) -> str | None:
    if param in _RENAMED:
        return _RENAMED[param]
    for theirs in ("response_format.json_schema", "response_format"):
        if param.startswith(f"{theirs}."):
            return f"text.format{param.removeprefix(theirs)}"
    return _tool_path.sub(r"\1", param)


def _messages(create: Create, history: Sequence[Item], items: Sequence[Item]) -> _Messages:
    messages = _Messages()
    if create.instructions:
        messages.add_system(create.instructions, "instructions")
    for item in history:
        messages.add(item, "previous_response_id")
    for number, item in enumerate(items):
        messages.add(item, f"input[{number}]")
    return messages


class _Messages:
    """Messages of a chat as they are written, and where each comes from."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self._written: list[ChatMessage] = []
        self._beginning: list[str] = []
        """The texts of the first message, if that is the system's."""
        self._calls: list[ToolCall] = []
        """Of the last message; put into it when there is no more to join."""

    def whole(self) -> tuple[ChatMessage, ...]:
        """All of them."""
        self._end_calls()
        if self._beginning:
            text = "\n\n".join(self._beginning)
            self._written[0] = ChatMessage(role="system", content=text)
        return tuple(self._written)

    def add(self, item: Item, place: str) -> None:
        """Append one item, or join it to the message it belongs to."""
        match item:
            case Message(role="assistant"):
                text = "".join(_texts(item.content))
                self._append(ChatMessage(role="assistant", content=text), place)
            case Message(role="user"):
                self._append(
                    ChatMessage(role="user", content=said_plainly(tuple(map(_part, item.content)))),
                    place,
                )
            case Message():
                self.add_system("".join(_texts(item.content)), place)
            case FunctionCall():
                self._add_call(item, place)
            case FunctionCallOutput():
                self._add_output(item, place)
            case Reasoning():
                return

    def add_system(self, text: str, place: str) -> None:
        """What stands at the beginning is one message: most chat templates take only one."""
        begins = len(self._written) == len(self._beginning[:1])
        if not (begins and self._beginning):
            self._append(ChatMessage(role="system", content=text), place)
        if begins:
            self._beginning.append(text)

    def _add_call(self, item: FunctionCall, place: str) -> None:
        """Calls of one turn are one message, with what the model said before them."""
        function = CalledFunction(name=item.name, arguments=item.arguments)
        call = ToolCall(id=item.call_id, function=function)
        if not self._written or self._written[-1].role != "assistant":
            self._append(ChatMessage(role="assistant"), place)
        self._calls.append(call)

    def _add_output(self, item: FunctionCallOutput, place: str) -> None:
        """A tool's message is text: media that it found follow as the user's."""
        output = item.output
        text = output if isinstance(output, str) else "".join(_texts(output))
        self._append(ChatMessage(role="tool", content=text, tool_call_id=item.call_id), place)
        media = () if isinstance(output, str) else tuple(_media(output))
        if media:
            self._append(ChatMessage(role="user", content=media), f"{place}.output")

    def _append(self, message: ChatMessage, place: str) -> None:
        self._end_calls()
        self._written.append(message)
        self.places.append(place)

    def _end_calls(self) -> None:
        if self._calls:
            calls, self._calls = tuple(self._calls), []
            self._written[-1] = msgspec.structs.replace(self._written[-1], tool_calls=calls)


def _texts(content: Iterable[Content]) -> Iterable[str]:
    for part in content:
        if isinstance(part, Refusal):
            yield part.refusal
        elif not isinstance(part, InputImage | InputAudio):
            yield part.text


def _media(content: Iterable[Content]) -> Iterable[Part]:
    return (_part(part) for part in content if isinstance(part, InputImage | InputAudio))


def _part(part: Content) -> Part:
    if isinstance(part, InputImage):
        return ImagePart(image_url=ImageURL(url=part.image_url, detail=part.detail))
    if isinstance(part, InputAudio):
        return AudioPart(input_audio=AudioData(data=part.data, format=part.format))
    return TextPart(text=part.refusal if isinstance(part, Refusal) else part.text)


def _tools(create: Create) -> tuple[tuple[Tool, ...], str | ChatChoice | None]:
    """Tools and the choice; a choice among some of them leaves the others out."""
    choice, tools = create.tool_choice, create.tools
    if isinstance(choice, AllowedTools):
        allowed = {tool.name for tool in choice.tools}
        tools = tuple(tool for tool in tools if tool.name in allowed)
        return tuple(map(_tool, tools)), choice.mode
    if isinstance(choice, NamedTool):
        return tuple(map(_tool, tools)), ChatChoice(function=NamedFunction(name=choice.name))
    return tuple(map(_tool, tools)), choice if tools else None


def _tool(tool: FunctionTool) -> Tool:
    return Tool(
        function=Function(
            name=tool.name,
            description=tool.description,
            parameters=None if tool.parameters is None else _raw(tool.parameters),
            strict=tool.strict,
        )
    )


def _format(create: Create) -> ResponseFormat | None:
    wanted = create.text.format
    if isinstance(wanted, PlainText):
        return None
    if not isinstance(wanted, JSONSchema):
        return ResponseFormat(type="json_object")
    schema = Schema(
        name=wanted.name,
        description=wanted.description,
        schema=_raw(wanted.schema),
        strict=wanted.strict,
    )
    return ResponseFormat(type="json_schema", json_schema=schema)


def _raw(fields: dict[str, msgspec.Raw]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(fields))
