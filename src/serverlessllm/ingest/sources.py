"""A spec's `source` → raw weights: `file://`, `hf://`, `s3://`, `az://`, `gs://`.

What is returned is pinned: the files of one commit, of one ETag each. Bytes are read in ranges
straight from where they lie, so no raw copy is ever on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import blake3
import msgspec

from serverlessllm.checkpoint.sources.base import RawCheckpoint, RawFile, open_file, open_folder
from serverlessllm.checkpoint.sources.pick import pick
from serverlessllm.core.clock import SystemClock
from serverlessllm.core.errors import (
    InvalidRequest,
    ModelNotFound,
    SLLMError,
)
from serverlessllm.core.ids import ModelId, model_name
from serverlessllm.ingest.hub import open_hub
from serverlessllm.ingest.remote import Fetcher, RemoteFile, as_source_error
from serverlessllm.ingest.settings import IngestSettings
from serverlessllm.store.errors import ObjectMissing
from serverlessllm.store.open import open_objects

_REVISION_HEX = 16
_WEIGHTS = (".gguf", ".safetensors", ".pt", ".pth", ".bin")
"""Ends of names that are a file, not a folder."""


def open_source(
    source: str, model: ModelId, settings: IngestSettings, fetcher: Fetcher
) -> RawCheckpoint:
    """The raw weights at `source`, for the model that a client calls `model`. Blocking.

    Raises:
        ModelNotFound: there is nothing at `source`.
        SourceDenied: it wants a credential.
        SourceUnavailable: it does not answer.
        InvalidRequest: not a URL we know.
        CheckpointError: what is there cannot be a checkpoint's source.
    """
    parts = urlsplit(source)
    match parts.scheme:
        case "file":
            raw = _open_local(Path(unquote(parts.path)), model)
        case "hf":
            raw = open_hub(source, model, settings, fetcher)
        case "s3" | "az" | "gs":
            raw = _open_bucket(source, model, settings, fetcher)
        case _:
            raise InvalidRequest(
                f"source {source[:200]!r}: use hf://org/name[@revision][/file.gguf], "
                "file:///folder, s3://, az:// or gs://",
                param="source",
            )
    return _picked(raw)


def _open_local(path: Path, model: ModelId) -> RawCheckpoint:
    """Local files have no revision of their own: their names, sizes and mtimes give them one."""
    if not path.exists():
        raise ModelNotFound(
            f"model {model}: its source has no file or folder {path.name!r} on this machine",
            param="model",
        )
    opened = open_folder if path.is_dir() else open_file
    raw = opened(path, model=model_name(model))
    return msgspec.structs.replace(raw, revision=f"local-{_digest(raw.files)}")


def _open_bucket(
    source: str, model: ModelId, settings: IngestSettings, fetcher: Fetcher
) -> RawCheckpoint:
    """A folder, or one file of weights, of an object store."""
    folder, _, file = source.rpartition("/") if source.endswith(_WEIGHTS) else (source, "", "")
    objects = open_objects(folder, settings.sources, SystemClock())
    try:
        found = [fetcher.head(objects, file)] if file else fetcher.list(objects)
    except ObjectMissing:
        found = []
    except SLLMError as error:
        raise as_source_error(error, source.rpartition("/")[2], objects.where) from None
    files: dict[str, RawFile] = {
        info.path: RemoteFile(
            name=info.path,
            path=info.path,
            size_bytes=info.size_bytes,
            etag=info.etag,
            version=info.etag or "",
            objects=objects,
            fetcher=fetcher,
        )
        for info in found
        if "/" not in info.path and not info.path.startswith(".")
    }
    if not files:
        raise ModelNotFound(f"model {model}: its source {objects.where} has no files there")
    return RawCheckpoint(
        files=files,
        model=model_name(model),
        source=source,
        revision=f"etag-{_digest(files)}",
    )


def _digest(files: Mapping[str, RawFile]) -> str:
    digest = blake3.blake3()
    for name, file in sorted(files.items()):
        digest.update(f"{name}\0{file.size_bytes}\0{file.version}\0".encode())
    return digest.hexdigest()[:_REVISION_HEX]


def _picked(raw: RawCheckpoint) -> RawCheckpoint:
    """Only the files that will be read. Raises CheckpointError when there is no model in it."""
    return msgspec.structs.replace(
        raw, files={name: raw.files[name] for name in pick(raw.files).names}
    )
