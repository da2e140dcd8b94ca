"""Which small files travel with the tensors: a closed list, and never code.

A configuration that names code of its repository (`auto_map`) is stored without that name, so
that no engine, whatever its settings, has a module to import.
"""

from __future__ import annotations

import json
import re

import msgspec

from serverlessllm.checkpoint.sources.base import MemoryFile, RawCheckpoint, RawFile, read_all
from serverlessllm.core.errors import CheckpointError
from serverlessllm.core.units import MIB

SIDE_FILE_BYTES_MAX = 64 * MIB
"""One side file; the longest in the wild are tokenizers of 35 MB."""
SIDE_FILES_MAX = 64
CONFIG_BYTES_MAX = 4 * MIB

_CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})
_ADAPTER_CODE_KEYS = frozenset({"auto_mapping"})
"""Of `adapter_config.json`: a module that PEFT imports; null where there is none."""
_CONFIG = r"(?:\w{1,60}_)?config\.json"
_ALLOWED = re.compile(
    rf"{_CONFIG}"
    r"|tokenizer[\w.-]{0,40}\.(?:json|model)"
    r"|vocab\.(?:json|txt)|merges\.txt|tekken\.json"
    r"|(?:spiece|spm|sentencepiece|sentencepiece\.bpe|source|target)\.(?:model|spm)"
    r"|\w{1,40}\.tiktoken"
    r"|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.(?:jinja|json)"
    r"|modules\.json|params\.json",
    re.ASCII,
)
_IS_CONFIG = re.compile(_CONFIG, re.ASCII)


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the converter itself wants from `config.json`."""

    architecture: str | None = None
    tied_embeddings: bool = False


def is_side_file(name: str) -> bool:
    """Whether a file of this name may be in a checkpoint."""
    return _ALLOWED.fullmatch(name) is not None


def collect_side_files(raw: RawCheckpoint) -> tuple[list[RawFile], ModelConfig]:
    """The side files of a source, code references taken out, and what `config.json` says.

    Raises:
        CheckpointError: one is too long, or a configuration is not a JSON object.
    """
    collected: list[RawFile] = []
    config = ModelConfig()
    for name in sorted(filter(is_side_file, raw.files)):
        file = raw.files[name]
        if file.size_bytes > SIDE_FILE_BYTES_MAX:
            raise CheckpointError(f"{name}: longer than {SIDE_FILE_BYTES_MAX} bytes")
        if _IS_CONFIG.fullmatch(name):
            data = read_all(file, CONFIG_BYTES_MAX)
            parsed = _parse_config(name, data)
            if name == "config.json":
                config = _model_config(parsed)
            file = MemoryFile(name, _without_code(name, parsed, data))
        collected.append(file)
    if len(collected) > SIDE_FILES_MAX:
        raise CheckpointError(f"{len(collected)} side files, more than {SIDE_FILES_MAX}")
    return collected, config


def check_no_code(file: RawFile) -> None:
    """Refuse a side file that is stored already and names code.

    Raises:
        CheckpointError: it does, or is a configuration that cannot be read.
    """
    if _IS_CONFIG.fullmatch(file.name) is None:
        return
    data = read_all(file, CONFIG_BYTES_MAX)
    if _without_code(file.name, _parse_config(file.name, data), data) != data:
        raise CheckpointError(
            f"{file.name} of this checkpoint names code, which `sllm convert` takes out: convert "
            "the model's own files"
        )


def _parse_config(name: str, data: bytes) -> dict[str, object]:
    """Lenient, as Hugging Face is: `Infinity` occurs in real configurations."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name}: not valid JSON") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{name}: not a JSON object")
    return parsed


def _model_config(parsed: dict[str, object]) -> ModelConfig:
    architectures = parsed.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return ModelConfig(
        architecture=first if isinstance(first, str) and first else None,
        tied_embeddings=parsed.get("tie_word_embeddings") is True,
    )


def _without_code(name: str, parsed: dict[str, object], data: bytes) -> bytes:
    """The same bytes when nothing names code; else the same JSON without those keys.

    Raises:
        CheckpointError: nested too deep to tell.
    """
    keys, found = _CODE_KEYS, False
    if name == "adapter_config.json" and parsed.get("auto_mapping") is not None:
        keys |= _ADAPTER_CODE_KEYS

    def clean(value: object) -> object:
        nonlocal found
        if isinstance(value, dict):
            found = found or not keys.isdisjoint(value)
            return {key: clean(item) for key, item in value.items() if key not in keys}
        if isinstance(value, list):
            return [clean(item) for item in value]
        return value

    try:
        cleaned = clean(parsed)
    except RecursionError:
        raise CheckpointError(f"{name}: the JSON is nested too deep") from None
    return json.dumps(cleaned, indent=2).encode() + b"\n" if found else data
