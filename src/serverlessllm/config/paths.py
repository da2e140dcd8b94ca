"""Where a process keeps its things: every path follows from the data directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import blake3
import msgspec

from serverlessllm.config.settings import Settings

_TRIES_MAX = 100
"""To be in a runtime directory before the last one out removes it."""


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """The directories and files of one installation on one machine."""

    data_dir: Path
    runtime_dir: Path
    """Unix sockets."""

    @property
    def metadata_file(self) -> Path:
        """The embedded metadata store."""
        return self.data_dir / "metadata.db"

    @property
    def store_dir(self) -> Path:
        """The default checkpoint store."""
        return self.data_dir / "store"

    @property
    def nvme_dir(self) -> Path:
        """The NVMe tier."""
        return self.data_dir / "nvme"

    @property
    def ingest_dir(self) -> Path:
        """Conversions under way."""
        return self.data_dir / "ingest"

    @property
    def logs_dir(self) -> Path:
        """A directory of logs per agent."""
        return self.data_dir / "logs"

    @property
    def token_file(self) -> Path:
        """What orchestrators and agents prove themselves with; made on first use."""
        return self.data_dir / "cluster-token"


def derive(settings: Settings, environ: Mapping[str, str]) -> Paths:
    """The paths that `settings` name, or the defaults of this user.

    Two data directories never share sockets: the name carries a digest of the path.
    """
    home = environ.get("HOME") or "/"
    data_home = environ.get("XDG_DATA_HOME") or str(Path(home) / ".local" / "share")
    data_dir = Path(settings.data_dir or Path(data_home) / "serverlessllm").expanduser().resolve()
    name = f"sllm-{os.getuid()}-{blake3.blake3(os.fsencode(data_dir)).hexdigest()[:8]}"
    runtime_home = Path(environ.get("XDG_RUNTIME_DIR") or "/tmp")  # noqa: S108 - made 0700 below
    runtime = settings.runtime_dir or runtime_home / name
    return Paths(data_dir=data_dir, runtime_dir=Path(runtime).expanduser().absolute())


@contextlib.contextmanager
def runtime_dir(directory: Path) -> Iterator[None]:
    """The directory of sockets while this process needs it; the last one out removes it.

    Raises:
        PermissionError: it is not ours alone.
    """
    held = _hold(directory)
    try:
        yield
    finally:
        with contextlib.suppress(BlockingIOError):  # others are in it
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sweep(directory)
        os.close(held)


def _hold(directory: Path) -> int:
    """A descriptor of the directory with a shared lock, the sign of whoever is in it."""
    for tries_left in reversed(range(_TRIES_MAX)):
        try:
            make_private(directory)
            held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, FileExistsError):
            if not tries_left:
                raise
            continue  # the last one out removed it just now
        fcntl.flock(held, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), directory.stat()):
                return held
        os.close(held)
    raise FileNotFoundError(errno.ENOENT, "removed again and again", str(directory))


def _sweep(directory: Path) -> None:
    """Remove locks and sockets, which mean nothing now. Records of processes that a killed agent
    left stay: its next start ends those."""
    for folder, _, names in os.walk(directory, topdown=False):
        for path in (Path(folder, name) for name in names):
            if path.is_socket() or path.stat().st_size == 0:
                path.unlink()
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def make_private(directory: Path) -> None:
    """Make the directory, or prove that it is ours alone.

    Raises:
        PermissionError: somebody else owns it (in a shared /tmp), or it is a link.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.lstat()
    if directory.is_symlink() or status.st_uid != os.getuid():
        raise PermissionError(
            f"{directory} belongs to another user: remove it, or set runtime_dir to one of yours"
        )
    if status.st_mode & 0o077:
        directory.chmod(0o700)


def cluster_token(path: Path) -> str:
    """The secret of the cluster's processes; the first of them makes it. Readable by us alone.

    Raises:
        PermissionError: somebody else can read it, or owns it.
    """
    if not path.exists():
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        # A link is whole or not there, and the first one wins.
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{path} must be readable by its owner alone: chmod 600 {path}")
    return path.read_text(encoding="ascii").strip()
