"""Structured logs on stderr: ids and figures, never a prompt, a body or a key.

structlog takes 0.2 s to import (it pulls in rich), so it is imported by the first line that is
written: a command that logs nothing does not pay for it.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO

from serverlessllm.telemetry.settings import LogFormat, LogLevel, TelemetrySettings

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from structlog.typing import FilteringBoundLogger, Processor

VALUE_CHARS_MAX = 2000
"""A longer text field is cut: a log line is not a place for documents."""

FORBIDDEN = frozenset(
    {
        "api_key", "authorization", "body", "chunk", "completion", "content", "cookie",
        "credential", "credentials", "embedding", "headers", "input", "key", "message", "messages",
        "output", "password", "prompt", "prompts", "secret", "text", "token", "tokens_text",
    }
)  # fmt: skip
"""Field names that would carry what clients said or what opens doors; dropped wherever logged."""
_FORBIDDEN_ENDINGS = ("_key", "_token", "_secret", "_password", "_prompt", "_body", "_content")
_STRUCTLOGS_OWN = frozenset({"exc_info", "stack_info", "_record", "_from_structlog"})
_STDLIB_NOISE = ("httpx", "httpcore", "huggingface_hub", "uvicorn.access", "asyncio")


class Log:
    """The log of one component. Fields are ids and figures: `log.info("loaded", model=m)`."""

    __slots__ = ("_component", "_logger")

    def __init__(self, component: str) -> None:
        self._component = component
        self._logger: FilteringBoundLogger | None = None

    def debug(self, event: str, **fields: object) -> None:
        if LOGGED.level <= logging.DEBUG:
            self._bound().debug(event, **fields)

    def info(self, event: str, **fields: object) -> None:
        if LOGGED.level <= logging.INFO:
            self._bound().info(event, **fields)

    def warning(self, event: str, **fields: object) -> None:
        if LOGGED.level <= logging.WARNING:
            self._bound().warning(event, **fields)

    def error(self, event: str, **fields: object) -> None:
        """Pass `exc_info=True` inside an `except` to add the traceback."""
        self._bound().error(event, **fields)

    def _bound(self) -> FilteringBoundLogger:
        if self._logger is None:
            if not LOGGED.configured:
                configure_logging(TelemetrySettings(log_level=LogLevel.WARNING))
            import structlog

            self._logger = structlog.get_logger(component=self._component)
        return self._logger


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: it may be replaced, and closed."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override] # read-only here
        return sys.stderr


class Logged:
    """What the process logs: read by every `Log`, written by `configure_logging` only."""

    __slots__ = ("configured", "level")

    def __init__(self) -> None:
        self.level: int = logging.WARNING
        """The least severe level that is written, as `logging` numbers it."""
        self.configured = False


LOGGED = Logged()


def log(component: str) -> Log:
    """The log of `component` (`agent`, `loader`, …): made at import, costs nothing until used."""
    return Log(component)


def configure_logging(settings: TelemetrySettings) -> None:
    """Send this process's events, and those of its libraries, to stderr; may be called again."""
    import structlog

    LOGGED.level = settings.log_level.number
    LOGGED.configured = True
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        drop_forbidden,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(LOGGED.level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = _ToStderr()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(settings.log_format),
            ],
        )
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _ToStderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(LOGGED.level)
    for name in _STDLIB_NOISE:
        logging.getLogger(name).setLevel(max(LOGGED.level, logging.WARNING))


def _renderers(log_format: LogFormat) -> list[Processor]:
    import structlog

    if log_format is LogFormat.AUTO:
        log_format = LogFormat.CONSOLE if sys.stderr.isatty() else LogFormat.JSON
    if log_format is LogFormat.CONSOLE:
        plain = structlog.dev.plain_traceback  # rich's would print local variables: prompts
        return [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=plain, pad_event_to=30
            )
        ]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_to_json)]


def _to_json(event: Mapping[str, object], **_: Any) -> str:
    import msgspec

    return msgspec.json.encode(event, enc_hook=str).decode()


def drop_forbidden(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Any:
    """A structlog processor: drops forbidden fields, and reduces every value to a figure or an id.

    A container or bytes is named by its type: it might hold anything a client sent.
    """
    for name in [n for n in event if is_forbidden(n)]:
        del event[name]
    for name, value in event.items():
        if name not in _STRUCTLOGS_OWN:
            event[name] = _plain(value)
    return event


def is_forbidden(name: str) -> bool:
    """Whether a field of this name is never logged."""
    lower = name.lower()
    return lower in FORBIDDEN or lower.endswith(_FORBIDDEN_ENDINGS)


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, bytes | bytearray | memoryview | dict | list | tuple | set | frozenset):
        return f"<{type(value).__name__}>"
    text = str(value)
    return text if len(text) <= VALUE_CHARS_MAX else text[:VALUE_CHARS_MAX] + "…"
