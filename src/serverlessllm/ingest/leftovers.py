"""Work folders: named for what they will be, gone on with after a crash, removed when done."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from pathlib import Path
from urllib.parse import quote, unquote

from serverlessllm.ingest.worker import LOCK_NAME
from serverlessllm.store.checkpoints import CheckpointStore
from serverlessllm.store.upload import uninterrupted


def work_folder(work_dir: Path, prefix: str) -> Path:
    """Where the checkpoint of `prefix` is converted: the same place for who goes on with it."""
    return work_dir / quote(prefix, safe="")


async def remove_folder(folder: Path) -> None:
    """Remove a work folder and all in it."""
    await uninterrupted(asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True))


async def sweep(work_dir: Path, store: CheckpointStore) -> None:
    """Remove the folders of checkpoints that somebody published, unless a worker is in there.

    Any other folder stays: the next ingestion of that model goes on with it.
    """
    for folder in await asyncio.to_thread(_folders, work_dir):
        prefix = unquote(folder.name)
        if not await asyncio.to_thread(_is_busy, folder) and await store.head(prefix) is not None:
            await remove_folder(folder)


def _folders(work_dir: Path) -> list[Path]:
    return [entry for entry in work_dir.iterdir() if entry.is_dir() and not entry.is_symlink()]


def _is_busy(folder: Path) -> bool:
    try:
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
