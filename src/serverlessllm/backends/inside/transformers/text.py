"""Text to tokens and back: the checkpoint's tokenizer and chat template, from memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from serverlessllm.backends.tools import with_tools
from serverlessllm.core.errors import InvalidRequest, LoadFailed

_CONTEXT_TOKENS = 6
"""Of the prompt that a decoder sees before the first new token, so that a token's leading space
comes out right."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_render = cast(Callable[..., tuple[list[str], object]], render_jinja_template)
_GAP_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
"""What stands before a gap's prefix, its suffix, and what fills it: Qwen's, StarCoder's."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class CalledFunction(msgspec.Struct, frozen=True):
    """What a call calls; templates want the arguments decoded."""

    name: str
    arguments: object


class Called(msgspec.Struct, frozen=True, kw_only=True):
    """A call that an answer made."""

    function: CalledFunction
    id: str | None = None
    type: str = "function"


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of a chat, its content already joined to one text."""

    role: str
    content: str
    tool_calls: list[Called] = []
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def of_tools(self) -> bool:
        """Whether only a template that knows tools can write it."""
        return bool(self.tool_calls) or self.role == "tool"


class Text:
    """The tokenizer of one checkpoint."""

    def __init__(self, files: dict[str, bytes], run_dir: Path) -> None:
        """`run_dir` is for a tokenizer that is not in one `tokenizer.json` only.

        Raises:
            LoadFailed: there is no tokenizer that can be read.
        """
        self._tokenizer = _tokenizer(files, run_dir)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _json(files, "tokenizer_config.json")
        self._template = _template(files, settings)
        self._named = _named_tokens(files, settings)
        eos = self._named.get("eos_token")
        self.eos_id: int | None = None if eos is None else self._tokenizer.token_to_id(eos)
        """The token that ends an answer, by the tokenizer's own word."""
        self._byte_of = _bytes_of_characters()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """A prompt's tokens; `special`: with those that the tokenizer begins each text with."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        continue_last: bool,
        tools: Sequence[object] = (),
        special: bool = False,
    ) -> list[int]:
        """A chat's tokens, as the checkpoint's template writes it; with `special` those before it
        that the tokenizer begins each text with, which templates mostly write themselves.

        Raises:
            InvalidRequest: the model has no template, or the template refuses these messages.
        """
        if self._template is None:
            raise InvalidRequest(
                "the model has no chat template: ask /v1/completions", param="messages"
            )
        template = self._template
        if tools or any(message.of_tools for message in messages):
            template = with_tools(template)
        try:
            rendered, _ = _render(
                conversations=[[msgspec.to_builtins(message) for message in messages]],
                tools=list(tools) or None,
                chat_template=template,
                add_generation_prompt=generation_prompt,
                continue_final_message=continue_last,
                **self._named,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from error
        ids: list[int] = self._tokenizer.encode(rendered[0], add_special_tokens=special).ids
        return ids

    def encode_gap(self, before: str, after: str) -> list[int]:
        """The tokens of a text with a gap, in the form that models for code are trained on.

        Raises:
            InvalidRequest: this model's vocabulary has no such form.
        """
        for marks in _GAP_MARKS:
            ids: list[int | None] = [self._tokenizer.token_to_id(mark) for mark in marks]
            tokens = []
            for mark, part in zip(ids, (before, after, ""), strict=True):
                if mark is None:
                    break
                tokens += [mark, *self.encode(part, special=False)]
            else:
                return tokens
        raise InvalidRequest("suffix: this model fills no gaps", param="suffix")

    def to_json(self) -> str:
        """The tokenizer, as its `tokenizer.json` has it."""
        text: str = self._tokenizer.to_str()
        return text

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Their text; `special`: with that of special ones."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def token(self, number: int) -> tuple[str, list[int]]:
        """One token's text and bytes; a piece of a character has bytes, but no text of its own."""
        text: str = self._tokenizer.decode([number], skip_special_tokens=False)
        if _REPLACEMENT not in text:
            return text, list(text.encode())
        piece = self._tokenizer.id_to_token(number) or ""
        if piece.startswith("<0x") and piece.endswith(">"):
            return text, [int(piece[3:-1], 16)]
        if all(character in self._byte_of for character in piece):
            return text, [self._byte_of[character] for character in piece]
        return text, list(text.encode())


class Decoder:
    """The text of one answer, as its tokens come. A character whose bytes are not all there yet
    is kept back, and so is what the next token may still change."""

    def __init__(self, text: Text, prompt: Sequence[int]) -> None:
        self._text = text
        self._ids = list(prompt[-_CONTEXT_TOKENS:])
        self._shown = len(self._ids)
        """Tokens whose text has been given out."""

    def push(self, ids: Sequence[int]) -> str:
        """What can be said after these tokens too."""
        self._ids += ids
        return self._next(whole=False)

    def rest(self) -> str:
        """What was kept back: the answer is over."""
        return self._next(whole=True)

    def _next(self, *, whole: bool) -> str:
        before = self._text.decode(self._ids[: self._shown])
        after = self._text.decode(self._ids)
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not whole):
            return ""
        # The tokens just shown are the context of the next: no need to decode the older ones again.
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return after[len(before) :]


class Stops:
    """Finds the texts that end an answer, also where they come in pieces, and keeps them back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._kept = ""
        self.hit = ""
        """The one that has come, if one has: nothing more is to be said."""

    def push(self, text: str, *, whole: bool = False) -> str:
        """What of it may be said; `whole`: nothing more will come."""
        text = self._kept + text
        self._kept = ""
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.hit = min(found)
            return text[:at]
        kept = 0 if whole else max((_overlap(stop, text) for stop in self._stops), default=0)
        if kept:
            self._kept = text[-kept:]
            return text[:-kept]
        return text


def _overlap(stop: str, text: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _tokenizer(files: dict[str, bytes], run_dir: Path) -> Tokenizer:
    try:
        if "tokenizer.json" in files:
            return Tokenizer.from_buffer(files["tokenizer.json"])
        folder = run_dir / "tokenizer"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        fast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return fast.backend_tokenizer
    except Exception as error:  # tokenizers raises no narrower class
        raise LoadFailed(f"the checkpoint's tokenizer cannot be read: {error}") from error


def _json(files: dict[str, bytes], name: str) -> dict[str, object]:
    try:
        parsed = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise LoadFailed(f"{name}: {error}") from error
    return parsed if isinstance(parsed, dict) else {}


def _template(files: dict[str, bytes], settings: dict[str, object]) -> str | None:
    """A file of its own, else in the tokenizer's settings: one text, or several with names."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    for said in (_json(files, "chat_template.json"), settings):
        template = said.get("chat_template")
        if isinstance(template, list):
            named = {item["name"]: item["template"] for item in template}
            template = named.get("default")
        if isinstance(template, str):
            return template
    return None


def _named_tokens(files: dict[str, bytes], settings: dict[str, object]) -> dict[str, str]:
    """`bos_token` and the like, which templates refer to."""
    said = _json(files, "special_tokens_map.json") | settings
    named = {}
    for name in _NAMED_TOKENS:
        token = said.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            named[name] = token
    return named


def _bytes_of_characters() -> dict[str, int]:
    """The printable alphabet that byte-level tokenizers write bytes in (GPT-2's)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}
