"""Which small files travel with the tensors: a closed list, never code."""

from __future__ import annotations

import re

from serverlessllm.core.units import MIB

SIDE_FILE_BYTES_MAX = 64 * MIB
"""One side file; the longest in the wild are tokenizers of 35 MB."""
SIDE_FILES_BYTES_MAX = 256 * MIB
SIDE_FILES_MAX = 64

_ALLOWED = re.compile(
    r"(?:\w+_)?config\.json"
    r"|tokenizer[\w.-]{0,40}\.(?:json|model)"
    r"|vocab\.(?:json|txt)|merges\.txt|tekken\.json"
    r"|(?:spiece|spm|sentencepiece|sentencepiece\.bpe|source|target)\.(?:model|spm)"
    r"|\w{1,40}\.tiktoken"
    r"|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.(?:jinja|json)"
    r"|modules\.json|params\.json",
    re.ASCII,
)
_CONFIG = re.compile(r"(?:\w+_)?config\.json", re.ASCII)


def is_side_file(name: str) -> bool:
    """Whether a file of this name may be in a checkpoint."""
    return len(name) <= 128 and _ALLOWED.fullmatch(name) is not None


def is_config(name: str) -> bool:
    """Whether a side file may name code to run (`auto_map`), which has to be taken out."""
    return _CONFIG.fullmatch(name) is not None
