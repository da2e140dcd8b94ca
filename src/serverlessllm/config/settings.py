"""All settings of a process: one frozen struct, one section a component.

A component's own options live with it (`<component>/settings.py`); here they only come together.
"""

from __future__ import annotations

import msgspec

from serverlessllm.orchestrator.settings import OrchestratorSettings


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The whole system. A key that is left out has the default shown here."""

    data_dir: str | None = None
    """Everything that survives a restart. auto: `serverlessllm` in the XDG data directory."""
    runtime_dir: str | None = None
    """Unix sockets; short, because a socket's path has at most 107 bytes. auto: a 0700 directory
    named for the user and the data directory, in XDG_RUNTIME_DIR or /tmp."""
    dram_dir: str | None = None
    """The DRAM tier: must lie on a tmpfs. auto: a directory in /dev/shm named likewise."""

    orchestrator: OrchestratorSettings = OrchestratorSettings()
