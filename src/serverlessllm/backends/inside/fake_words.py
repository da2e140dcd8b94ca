"""What the fake engine says: the same words for the same prompt, and values that hold a schema."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

WORDS = (
    *("a", "the", "one", "model", "answers", "with", "words", "that", "nobody", "computed"),
    *("which", "come", "at", "the", "same", "place", "each", "time", "and", "mean", "nothing"),
)
EMBEDDING_WIDTH = 8
_WORDS_REMEMBERED = 65_536
_DEPTH_MAX = 16
"""Of a value that holds a schema."""
_PIECE = re.compile(r".{1,4}", re.DOTALL)
_WORD = re.compile(r"\s*\S+|\s+$")


def token_at(prompt: str, number: int) -> str:
    """The token at this place of the answer to this prompt."""
    word = WORDS[zlib.crc32(f"{number} {prompt}".encode()) % len(WORDS)]
    return word if number == 0 else f" {word}"


def logprob_of(token: str) -> float:
    """A small one, by the token alone."""
    return -(1 + zlib.crc32(token.encode()) % 99) / 100


def alternatives_of(token: str, count: int) -> list[tuple[str, float]]:
    """The token, and others that are less likely."""
    others = [word for word in dict.fromkeys(WORDS) if word != token.strip()]
    first = logprob_of(token)
    ranked = [(token, first), *((f" {word}", first - 1 - n) for n, word in enumerate(others))]
    return ranked[:count]


def embedding_of(text: str, width: int = EMBEDDING_WIDTH) -> list[float]:
    """A unit vector that depends on the text alone."""
    raw = [zlib.crc32(f"{axis} {text}".encode()) / 2**31 - 1 for axis in range(width)]
    norm = sum(value * value for value in raw) ** 0.5 or 1.0
    return [value / norm for value in raw]


def base64_of(vector: list[float]) -> str:
    """Little-endian float32, as the API writes it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def score_of(query: str, document: str) -> float:
    """The share of the query's words that are in the document."""
    words = set(query.lower().split())
    return len(words & set(document.lower().split())) / max(1, len(words))


def pieces_of(text: str) -> list[str]:
    """A text that is not made of words, as tokens."""
    return _PIECE.findall(text)


class Vocabulary:
    """Words as token ids, and back: those of texts that it has seen."""

    def __init__(self) -> None:
        self._words: OrderedDict[int, str] = OrderedDict()

    def encode(self, text: str) -> list[int]:
        return [self._number(word) for word in self.words(text)]

    def words(self, text: str) -> list[str]:
        """Each with the white space before it; together they are the text."""
        return _WORD.findall(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self._words.get(token, f" <{token}>") for token in tokens)

    def _number(self, word: str) -> int:
        number = zlib.crc32(word.encode()) >> 1
        self._words[number] = word
        self._words.move_to_end(number)
        if len(self._words) > _WORDS_REMEMBERED:
            self._words.popitem(last=False)
        return number


def value_of(schema: object, root: Mapping[str, Any] | None = None, depth: int = 0) -> object:
    """A small value that holds the schema, as far as it is one of the usual kinds."""
    if not isinstance(schema, Mapping) or depth > _DEPTH_MAX:
        return {} if depth == 0 else None
    root = schema if root is None else root
    if isinstance(schema.get("$ref"), str):
        return value_of(_referred(schema["$ref"], root), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return value_of(schema[key][0], root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema or not depth else "null")
    return _typed(kind[0] if isinstance(kind, list) else kind, schema, root, depth)


def _typed(kind: str, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> object:
    match kind:
        case "object":
            properties = schema.get("properties", {})
            names = dict.fromkeys((*properties, *schema.get("required", ())))
            return {name: value_of(properties.get(name, {}), root, depth + 1) for name in names}
        case "array":
            item = value_of(schema.get("items", {}), root, depth + 1)
            return [item] * schema.get("minItems", 0)
        case "string":
            word = WORDS[depth % len(WORDS)]
            return word.ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength", len(word))]
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return True
    return None


def _referred(pointer: str, root: Mapping[str, Any]) -> object:
    found: Any = root
    for part in pointer.removeprefix("#").split("/")[1:]:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
