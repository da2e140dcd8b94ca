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
    templates_preload: tuple[str, ...] = ()
    """Templates to start with the agent; the others start when a model first needs them. A
    template is a process that holds an engine's imports, so that an instance is a fork of it."""
    templates_max: int = 4
    """Template processes kept at once; the least recently used goes first."""
    template_idle_s: float = 3600.0
    """A template that has forked nothing for so long is ended, to give its memory back."""
    template_start_timeout_s: float = 120.0
    """How long a template may import."""
    template_wait_s: float = 30.0
    """How long a launch waits for a template that is starting; then it does without."""
    template_fork_timeout_s: float = 5.0
    """How long a template may take to fork; then the launch does without."""
    template_ready_timeout_s: float = 60.0
    """How long a fork may take to be ready; then it is killed and the launch does without."""
    template_restart_s_min: float = 0.5
    """First pause before a template that failed is started again; it doubles."""
    template_restart_s_max: float = 600.0
    """Longest such pause."""
