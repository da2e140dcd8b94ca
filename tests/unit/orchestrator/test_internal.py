"""The socket of the application behind the edge."""

from __future__ import annotations

import os
import subprocess
import sys

from starlette.applications import Starlette

from serverlessllm.orchestrator.rest.internal import InternalServer


async def test_sockets_of_killed_processes_are_removed_and_no_others(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    killed = tmp_path / f"api-{ended.pid}-1.sock"
    living = tmp_path / f"api-{os.getppid()}-1.sock"
    for path in (killed, living):
        path.touch()
    server = InternalServer(Starlette(), tmp_path)
    await server.start()
    assert not killed.exists()
    await server.close()
    assert list(tmp_path.iterdir()) == [living]
