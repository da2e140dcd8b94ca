"""Which signals tell a verb to end, so that it removes what it made."""

from __future__ import annotations

import signal


def end_signals() -> tuple[signal.Signals, ...]:
    """SIGTERM, and SIGHUP, a terminal's end; under `nohup` that one stays ignored."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return (signal.SIGTERM,)
    return signal.SIGTERM, signal.SIGHUP
