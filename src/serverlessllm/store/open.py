"""A URL → a store: the one door for `file`, `memory`, `s3`, `az` and `gs`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import (
    AzureStore,
    GCSStore,
    LocalStore,
    MemoryStore,
    ObjectStore,
    S3Store,
)

from serverlessllm.core.clock import Clock
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.errors import StoreMisconfigured, translate
from serverlessllm.store.objects import Objects
from serverlessllm.store.settings import StoreSettings

if TYPE_CHECKING:  # these two exist only for type checkers
    from obstore.store import ClientConfig, RetryConfig

SCHEMES = ("file", "memory", "s3", "az", "gs")


def open_store(url: str, settings: StoreSettings, clock: Clock) -> CheckpointStore:
    """The checkpoint store at `url`; nothing is asked of it yet.

    `file:///folder` · `memory://` (this process only) · `s3://bucket[/folder]` ·
    `az://container[/folder]` · `gs://bucket[/folder]`.

    Raises:
        StoreMisconfigured: unknown scheme, no bucket, or options the store does not know.
        OutOfSpace: the folder of a `file://` store cannot be made for want of room.
    """
    return CheckpointStore(open_objects(url, settings, clock, create=True))


def open_objects(
    url: str, settings: StoreSettings, clock: Clock, *, create: bool = False
) -> Objects:
    """The objects under `url`. `create`: make the folder of a `file://` URL if it is missing."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise StoreMisconfigured(
            f"store URL {parts.scheme + '://…' if parts.scheme else url!r}: "
            f"use one of {', '.join(scheme + '://' for scheme in SCHEMES)}"
        )
    if parts.scheme == "file":
        return _open_folder(Path(unquote(parts.path)), parts.netloc, settings, clock, create)
    if parts.scheme == "memory":
        memory = MemoryStore()
        return Objects(memory, memory, where="memory://", settings=settings, clock=clock)
    if not parts.netloc:
        raise StoreMisconfigured(
            f"store URL {url!r} names no bucket: write {parts.scheme}://bucket[/folder]"
        )
    where = f"{parts.scheme}://{parts.hostname or parts.netloc}"
    if settings.endpoint is not None:
        where += f" at {urlsplit(settings.endpoint).netloc.rpartition('@')[2]}"
    folder = unquote(parts.path).strip("/") or None
    try:
        client = _open_bucket(parts.scheme, parts.netloc, folder, settings, tries=1)
        uploads = _open_bucket(parts.scheme, parts.netloc, folder, settings, tries=settings.tries)
    except (BaseError, ValueError, TypeError) as error:
        raise StoreMisconfigured(
            f"the store {where} cannot be opened: check the keys of store.options"
        ) from error
    return Objects(client, uploads, where=where, settings=settings, clock=clock)


def _open_folder(
    path: Path, host: str, settings: StoreSettings, clock: Clock, create: bool
) -> Objects:
    if host not in {"", "localhost"} or not path.is_absolute():
        raise StoreMisconfigured("store URL: write file:///absolute/folder, with three slashes")
    where = f"file://…/{path.name}"  # clients see it: no path of ours
    try:
        store = LocalStore(path, automatic_cleanup=True, mkdir=create)
    except (BaseError, OSError) as error:
        raise translate(error, where) from error
    return Objects(store, store, where=where, settings=settings, clock=clock, root=path)


def _open_bucket(
    scheme: str, bucket: str, folder: str | None, settings: StoreSettings, *, tries: int
) -> ObjectStore:
    client: ClientConfig = {
        "allow_http": settings.allow_http,
        "connect_timeout": timedelta(seconds=settings.connect_timeout_s),
        "timeout": timedelta(seconds=settings.request_timeout_s),
    }
    retry: RetryConfig = {
        "max_retries": tries - 1,
        "backoff": {
            "init_backoff": timedelta(seconds=settings.retry_min_s),
            "max_backoff": timedelta(seconds=settings.retry_max_s),
        },
    }
    config = dict(settings.options)
    if settings.endpoint is not None:
        config["endpoint"] = settings.endpoint
    if scheme == "s3" and settings.region is not None:
        config["region"] = settings.region
    # The three stores differ in their typed option keys only; ours come from the configuration,
    # and the store itself refuses one that it does not know.
    kwargs: dict[str, Any] = {
        "prefix": folder,
        "config": cast("Any", config),
        "client_options": client,
        "retry_config": retry,
    }
    match scheme:
        case "s3":
            return S3Store(bucket, **kwargs)
        case "az":
            return AzureStore(bucket, **kwargs)
        case _:
            return GCSStore(bucket, **kwargs)
