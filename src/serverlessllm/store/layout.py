"""Where a checkpoint's two objects lie: `<model>/<revision>/model.bin` and `model.idx`."""

from __future__ import annotations

import re

from serverlessllm.core.errors import InvalidRequest
from serverlessllm.core.ids import ModelId, model_name

_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){1,2}")


def prefix_of(model: ModelId, revision: str) -> str:
    """The store prefix of one revision of a model; what a prefix cannot hold becomes `-`."""
    return check_prefix(f"{model_name(model)}/{re.sub(r'[^A-Za-z0-9._-]', '-', revision)}")


def check_prefix(prefix: str) -> str:
    """`[org/]name/revision`, and nothing that could leave the store's folder."""
    if _PREFIX.fullmatch(prefix) is None or len(prefix) > 512:
        raise InvalidRequest(
            f"checkpoint prefix {prefix[:100]!r}: must be [org/]name/revision of letters, "
            "digits, '.', '_' and '-'"
        )
    return prefix
