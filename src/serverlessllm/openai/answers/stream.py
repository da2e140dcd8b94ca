"""An answer that comes in pieces."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, UnsetType

from serverlessllm.core.errors import SLLMError
from serverlessllm.openai.answers.asked import Asked, Kind
from serverlessllm.openai.answers.chat import ChatVoice, SaidChoice
from serverlessllm.openai.answers.events import EVENT_BYTES_MAX, EventReader
from serverlessllm.openai.answers.failures import failure, nonsense
from serverlessllm.openai.answers.identity import Said, Stamp, identify
from serverlessllm.openai.answers.text import SaidText, TextVoice
from serverlessllm.openai.answers.usage import Usage, read_usage
from serverlessllm.openai.sse import DONE

_END = b"[DONE]"
_WORDS = (_END, b"", b"null")
"""What is no chunk, and still no nonsense: llama.cpp begins with a null where there are several
prompts."""
_encode = msgspec.json.Encoder().encode


class _ChatChunk(msgspec.Struct):
    choices: list[SaidChoice] | UnsetType | None = UNSET
    usage: Raw | UnsetType = UNSET
    error: object = None


class _TextChunk(msgspec.Struct):
    choices: list[SaidText] | UnsetType | None = UNSET
    usage: Raw | UnsetType = UNSET
    error: object = None


_said = msgspec.json.Decoder(Said)
_decode_chat = msgspec.json.Decoder(_ChatChunk).decode
_decode_text = msgspec.json.Decoder(_TextChunk).decode


class StreamedAnswer:
    """A state machine: the engine's bytes in, cut anywhere, the client's events out.

    Whole events only: wherever it breaks off, an error event may follow.
    """

    def __init__(self, asked: Asked, stamp: Stamp) -> None:
        self.usage: Usage | None = None
        """What the engine has counted; whole when `done`."""
        self.error: SLLMError | None = None
        """Why nothing more comes out: to be told by an error event, or by a status."""
        self.done = False
        """Whether the answer is whole: its last event, `[DONE]`, has come out."""
        self._asked = asked
        self._stamp = stamp
        self._events = EventReader()
        self._decode = _decode_chat if asked.kind is Kind.CHAT else _decode_text
        self._voices: dict[int, ChatVoice | TextVoice] = {}
        self._head = self._tail = b""
        self._name = stamp.name

    @property
    def over(self) -> bool:
        """Whether nothing more comes out."""
        return self.done or self.error is not None

    def feed(self, data: bytes) -> bytes:
        """What the client gets now, for what the engine sent now."""
        if self.over:
            return b""
        out: list[bytes] = []
        try:
            for event in self._events.feed(data):
                self._take(event, out)
                if self.done:
                    break
            if self._events.too_long and not self.done:
                raise nonsense(f"an event is longer than {EVENT_BYTES_MAX} bytes")
        except SLLMError as error:
            self.error = error
        return out[0] if len(out) == 1 else b"".join(out)

    def end(self) -> bytes:
        """The engine has sent everything: what the client gets at the end."""
        said = self.feed(b"\n\n")
        if self.over:
            return said
        if not self._voices or not all(voice.ended for voice in self._voices.values()):
            self.error = nonsense("it ended early")
            return said
        out = [said]
        self._finish(out)
        return b"".join(out)

    def _take(self, event: bytes, out: list[bytes]) -> None:
        chunk = self._read(event)
        if chunk is None:
            if event.strip() == _END:
                self._finish(out)
            return
        if chunk.usage is not UNSET:
            self.usage = read_usage(chunk.usage) or self.usage
        if chunk.choices:
            if not self._head:
                self._begin(event)
            for said in chunk.choices:
                voice = self._voices.get(said.index or 0) or self._voice(said.index or 0)
                voice.say(said, out)  # type: ignore[arg-type]  # both are of the asked kind

    def _read(self, event: bytes) -> _ChatChunk | _TextChunk | None:
        """The event as a chunk; None when it is the stream's end, or empty.

        Raises:
            SLLMError: it is an error, or nonsense.
        """
        try:
            if not event.isascii():
                event.decode()
            chunk = self._decode(event)
        except (ValueError, RecursionError) as error:
            if event.strip() in _WORDS:
                return None
            if isinstance(error, msgspec.ValidationError):
                raise nonsense(str(error)) from None
            raise failure(event, self._asked.kind) from None
        if chunk.error is not None or (chunk.choices is UNSET and chunk.usage is UNSET):
            raise failure(event, self._asked.kind)
        return chunk

    def _begin(self, event: bytes) -> None:
        """The first choice has come, and with it the names that all chunks carry."""
        asked = self._asked
        named = identify(asked, self._stamp, _said.decode(event))
        self._name = named.name
        fields: dict[str, object] = {
            "id": named.id,
            "object": "chat.completion.chunk" if asked.kind is Kind.CHAT else "text_completion",
            "created": named.created_s,
            "model": named.model,
            "system_fingerprint": named.system_fingerprint,
        }
        if named.service_tier is not None:
            fields["service_tier"] = named.service_tier
        self._head = b'data: %b,"choices":[' % _encode(fields)[:-1]
        self._tail = b'],"usage":null}\n\n' if asked.include_usage else b"]}\n\n"

    def _voice(self, index: int) -> ChatVoice | TextVoice:
        voice: ChatVoice | TextVoice
        logprobs = self._asked.logprobs
        if self._asked.kind is Kind.CHAT:
            voice = ChatVoice(self._head, self._tail, index, logprobs=logprobs, name=self._name)
        else:
            voice = TextVoice(self._head, self._tail, index, logprobs=logprobs)
        self._voices[index] = voice
        return voice

    def _finish(self, out: list[bytes]) -> None:
        if not self._voices:
            raise nonsense("it has no choices")
        for voice in self._voices.values():
            if not voice.ended:
                voice.finish("stop", out)
        if self._asked.include_usage and self.usage is not None:
            out.append(b'%b],"usage":%b}\n\n' % (self._head, _encode(self.usage)))
        out.append(DONE)
        self.done = True
