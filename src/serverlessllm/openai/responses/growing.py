"""Items of an answer while they grow: each tells its own events."""

from __future__ import annotations

from collections.abc import Iterator

from serverlessllm.openai.chats import TokenLogprob
from serverlessllm.openai.responses import events
from serverlessllm.openai.responses.events import Event
from serverlessllm.openai.responses.items import (
    FunctionCall,
    Message,
    OutputPart,
    OutputText,
    Reasoning,
    ReasoningText,
    Refusal,
    Status,
)


class GrowingMessage:
    """A message: one part at a time grows, of text or of refusal."""

    def __init__(self, item_id: str, index: int, numbers: Iterator[int]) -> None:
        self._id = item_id
        self._index = index
        self._numbers = numbers
        self._done: list[OutputPart] = []
        self._kind: type[OutputPart] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def begin(self, kind: type[OutputPart]) -> Iterator[Event]:
        """Go on with a part of this kind, a new one if need be."""
        if self._kind is kind:
            return
        yield from self.close()
        self._kind = kind
        yield events.PartAdded(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            content_index=len(self._done),
            part=self._part(kind),
        )

    def add_text(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> Iterator[Event]:
        yield from self.begin(OutputText)
        self._pieces.append(text)
        self._logprobs += logprobs
        yield events.TextDelta(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            content_index=len(self._done),
            delta=text,
            logprobs=logprobs,
        )

    def add_refusal(self, text: str) -> Iterator[Event]:
        yield from self.begin(Refusal)
        self._pieces.append(text)
        yield events.RefusalDelta(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            content_index=len(self._done),
            delta=text,
        )

    def close(self) -> Iterator[Event]:
        """The part that grows is whole."""
        if self._kind is None:
            return
        index, part = len(self._done), self._part(self._kind)
        if isinstance(part, OutputText):
            yield events.TextDone(
                sequence_number=next(self._numbers),
                output_index=self._index,
                item_id=self._id,
                content_index=index,
                text=part.text,
                logprobs=part.logprobs,
            )
        else:
            yield events.RefusalDone(
                sequence_number=next(self._numbers),
                output_index=self._index,
                item_id=self._id,
                content_index=index,
                refusal=part.refusal,
            )
        yield events.PartDone(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            content_index=index,
            part=part,
        )
        self._done.append(part)
        self._kind = None
        self._pieces, self._logprobs = [], []

    def item(self, status: Status) -> Message:
        """The item with the parts that are whole."""
        return Message(id=self._id, role="assistant", status=status, content=tuple(self._done))

    def _part(self, kind: type[OutputPart]) -> OutputPart:
        text = "".join(self._pieces)
        if kind is OutputText:
            return OutputText(text=text, logprobs=tuple(self._logprobs))
        return Refusal(refusal=text)


class GrowingReasoning:
    """What the model thinks before it speaks."""

    def __init__(self, item_id: str, index: int, numbers: Iterator[int]) -> None:
        self._id = item_id
        self._index = index
        self._numbers = numbers
        self._pieces: list[str] = []

    def add(self, text: str) -> Iterator[Event]:
        if not self._pieces:
            yield events.PartAdded(
                sequence_number=next(self._numbers),
                output_index=self._index,
                item_id=self._id,
                content_index=0,
                part=ReasoningText(text=""),
            )
        self._pieces.append(text)
        yield events.ReasoningDelta(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            content_index=0,
            delta=text,
        )

    def close(self) -> Iterator[Event]:
        text = "".join(self._pieces)
        yield events.ReasoningDone(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            content_index=0,
            text=text,
        )
        yield events.PartDone(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            content_index=0,
            part=ReasoningText(text=text),
        )

    def item(self, status: Status) -> Reasoning:
        text = "".join(self._pieces)
        content = (ReasoningText(text=text),) if text else ()
        return Reasoning(id=self._id, content=content, status=status)


class GrowingCall:
    """A call of a function whose arguments grow. `place` is among the calls of the chat."""

    def __init__(
        self, item_id: str, index: int, numbers: Iterator[int], call_id: str, name: str, place: int
    ) -> None:
        self._id = item_id
        self._index = index
        self._numbers = numbers
        self._call_id = call_id
        self._name = name
        self.place = place
        self._pieces: list[str] = []

    def add(self, arguments: str) -> Iterator[Event]:
        self._pieces.append(arguments)
        yield events.ArgumentsDelta(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            delta=arguments,
        )

    def close(self) -> Iterator[Event]:
        yield events.ArgumentsDone(
            sequence_number=next(self._numbers),
            output_index=self._index,
            item_id=self._id,
            name=self._name,
            arguments="".join(self._pieces),
        )

    def item(self, status: Status) -> FunctionCall:
        return FunctionCall(
            id=self._id,
            call_id=self._call_id,
            name=self._name,
            arguments="".join(self._pieces),
            status=status,
        )


Growing = GrowingMessage | GrowingReasoning | GrowingCall
