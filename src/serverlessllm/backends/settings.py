"""Bounds of a supervised backend process."""

from __future__ import annotations

import msgspec

from serverlessllm.core.units import MIB


class BackendSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How backend processes are started, watched and stopped."""

    probe_s_min: float = 0.005
    """First pause between two readiness probes of a server that cannot tell; it doubles."""
    probe_s_max: float = 0.1
    """Longest such pause."""
    probe_timeout_s: float = 2.0
    """How long one readiness probe may take."""
    term_s: float = 3.0
    """Between SIGTERM and SIGKILL."""
    kill_s: float = 5.0
    """How long the kernel may take to end a killed process before we stop waiting for it."""
    log_bytes_max: int = 8 * MIB
    """Output kept of one backend, in two files of half this size."""
    log_files_max: int = 32
    """Backends whose logs are kept; the oldest go first."""
    log_tail_lines: int = 20
    """Last lines of its output that a crash report shows."""
