"""Write `docs/compatibility.md`, below the current directory."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from serverlessllm.testing.compatibility.engines import BACKENDS
from serverlessllm.testing.compatibility.page import ask_all, render


async def _main() -> None:
    columns = []
    for backend in BACKENDS:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            columns.append(await ask_all(backend, Path(folder)))
    await asyncio.to_thread(Path("docs/compatibility.md").write_text, render(columns))


asyncio.run(_main())
