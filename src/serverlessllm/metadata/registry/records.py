"""Records as JSON with a schema version, across versions of this program.

A record of a newer major version is refused, and said so. A record of the same version may hold
fields that this program does not know (a newer minor version wrote them): they are ignored by a
reader, and kept when a model's or a key's record is rewritten (`encode` with `previous`). Agents
and jobs need no such care: each has one writer, which writes the whole record.
"""

from __future__ import annotations

from types import UnionType
from typing import TypeVar, Union, get_args, get_origin

import msgspec

from serverlessllm.core.apikeys import ApiKey
from serverlessllm.core.cluster import AgentRecord, JobRecord
from serverlessllm.core.errors import UnreadableRecord
from serverlessllm.core.models import SCHEMA_VERSION, ModelRecord
from serverlessllm.metadata.base import Entry
from serverlessllm.telemetry.logs import log
from serverlessllm.telemetry.table import RECORDS_REFUSED

Record = TypeVar("Record", ModelRecord, AgentRecord, JobRecord, ApiKey)

_ENCODER = msgspec.json.Encoder()
_log = log("metadata")


class _Versioned(msgspec.Struct, frozen=True):
    schema_version: int = SCHEMA_VERSION


def decode(data: bytes, kind: type[Record], key: str) -> Record:
    """Read a record.

    Raises:
        UnreadableRecord: written by a newer major version, or damaged; names `key`.
    """
    try:
        record = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError) as error:
        _refuse_newer(_version(data, key), key)
        raise UnreadableRecord(f"record {key} is damaged: {error}") from error
    _refuse_newer(record.schema_version, key)
    return record


def _version(data: bytes, key: str) -> int:
    try:
        return msgspec.json.decode(data, type=_Versioned).schema_version
    except (msgspec.DecodeError, ValueError) as error:
        raise UnreadableRecord(f"record {key} is damaged: {error}") from error


def _refuse_newer(version: int, key: str) -> None:
    if version > SCHEMA_VERSION:
        raise UnreadableRecord(
            f"record {key} has schema version {version}, this program reads up to "
            f"{SCHEMA_VERSION}: upgrade it"
        )


def encode(record: Record, previous: bytes | None = None) -> bytes:
    """Write a record; fields of `previous` that this program does not know are kept."""
    if previous is None:
        return _ENCODER.encode(record)
    try:
        old = msgspec.json.decode(previous)
    except (msgspec.DecodeError, ValueError):
        return _ENCODER.encode(record)
    return _ENCODER.encode(_merge(type(record), old, msgspec.to_builtins(record)))


def _merge(kind: type[msgspec.Struct], old: object, new: object) -> object:
    """`new`, with what `old` has beyond the fields of `kind`; likewise for nested structs.

    A nested struct with another `id` is another thing: it inherits nothing.
    """
    if not isinstance(old, dict) or not isinstance(new, dict) or old.get("id") != new.get("id"):
        return new
    fields = {f.encode_name: f.type for f in msgspec.structs.fields(kind)}
    merged = {**{name: value for name, value in old.items() if name not in fields}, **new}
    for name, annotation in fields.items():
        nested = _struct_of(annotation)
        if nested is not None and name in old and name in merged:
            merged[name] = _merge(nested, old[name], merged[name])
    return merged


def _struct_of(annotation: object) -> type[msgspec.Struct] | None:
    """The struct in `Struct` or `Struct | None`."""
    options = (
        get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    )
    for option in options:
        if isinstance(option, type) and issubclass(option, msgspec.Struct):
            return option
    return None


def readable(entry: Entry, kind: type[Record]) -> Record | None:
    """The record of an entry, or None (logged, counted) when this version cannot read it.

    For listings and watches, where one bad record must not hide the others.
    """
    try:
        return decode(entry.value, kind, entry.key)
    except UnreadableRecord as error:
        RECORDS_REFUSED.inc(kind.__name__)
        _log.warning("record refused", entry=entry.key, reason=error.message)
        return None
