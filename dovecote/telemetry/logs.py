"""One line an event, to stderr: for people on a terminal, JSON for machines.

The last processor before the line is written takes secrets and phone numbers out of every value, whichever library
logged it: there a field's name still says what it is, and no JSON has put backslashes into it.
"""

import logging
import os
import sys
import threading
import time
from typing import Any, TextIO

import structlog
from dramatiq import Message
from dramatiq.broker import MessageProxy
from dramatiq.compat import StreamablePipe
from structlog.typing import EventDict, Processor

from dovecote import settings as options
from dovecote.masking import masked_fields
from dovecote.processes.terminal import block, plain
from dovecote.telemetry import context as work
from dovecote.telemetry import traces
from dovecote.telemetry.failures import traceback_of

# While a collector is away, OpenTelemetry says so several times every ten seconds.
_REPEAT_SECONDS = 60.0
# Characters of each field of a line.
_MAX_FIELD = 8_000


def configure_logs(telemetry: options.Telemetry, component: str) -> None:
    """Send one line an event to stderr, for people or for machines; the last call wins."""
    on_terminal = _is_terminal(sys.stderr)
    for_people = telemetry.log_format == "console" or (telemetry.log_format == "auto" and on_terminal)
    level = getattr(logging, telemetry.log_level.upper())

    def bind(_: Any, __: str, event: EventDict) -> EventDict:
        # What the caller says himself is nearer to the truth. No context variable for the component: a thread
        # starts without any.
        return {**event, **{name: value for name, value in _fields(component).items() if name not in event}}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        bind,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if for_people else "iso", utc=not for_people),
        structlog.processors.ExceptionRenderer(_traceback),
    ]
    last: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, _mask]
    if for_people:
        last.append(_legible)
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=on_terminal, pad_event_to=0, sort_keys=False)
        if for_people
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    handler = _Handler(sys.stderr)
    handler.addFilter(_name_messages)
    handler.addFilter(_NotAgain("opentelemetry."))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[*last, renderer],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Libraries speak up when something is wrong; their small talk is for debugging.
    for name in ("dramatiq", "alembic", "opentelemetry"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if level > logging.DEBUG else level)
    structlog.contextvars.clear_contextvars()


def log_uncaught() -> None:
    """Log what ends this process or one of its threads; Python would print it unmasked."""
    log = structlog.get_logger()

    def end_of_thread(end: threading.ExceptHookArgs) -> None:
        if end.exc_value is not None and not isinstance(end.exc_value, SystemExit):
            log.critical("a thread ends", thread=end.thread and end.thread.name, exc_info=end.exc_value)

    def end_of_process(_: type[BaseException], error: BaseException, __: object) -> None:
        log.critical("the process ends", exc_info=error)

    threading.excepthook = end_of_thread
    sys.excepthook = end_of_process


def _fields(component: str) -> dict[str, object]:
    return {"component": component, **work.fields(), **traces.ids()}


def _mask(_: Any, __: str, event: EventDict) -> EventDict:
    return masked_fields(event, _MAX_FIELD)


def _legible(_: Any, __: str, event: EventDict) -> EventDict:
    # What is no text becomes its `repr`, which escapes as we do. JSON is ASCII.
    return {
        plain(name): (block if name in ("exception", "stack") else plain)(value) if isinstance(value, str) else value
        for name, value in event.items()
    }


def _traceback(exc_info: Any) -> str:
    return traceback_of(exc_info[1]).rstrip() if exc_info[1] else ""


def _is_terminal(stream: TextIO) -> bool:
    # A worker of Dramatiq writes to a pipe, which its master copies to the stderr that both have.
    return stream.isatty() or (isinstance(stream, StreamablePipe) and os.isatty(2))


def _name_messages(record: logging.LogRecord) -> bool:
    """Let Dramatiq's own lines name a message instead of printing it: it holds hundreds of payloads."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            f"{value.actor_name} {value.message_id}" if isinstance(value, Message | MessageProxy) else value
            for value in record.args
        )
    return True


class _NotAgain:
    """Lets each message of these loggers through once a minute, whatever its arguments."""

    def __init__(self, loggers: str) -> None:
        self._loggers = loggers
        self._said: dict[str, float] = {}

    def __call__(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(self._loggers):
            return True
        now = time.monotonic()
        key = f"{record.name} {record.msg}"
        if now < self._said.get(key, 0.0):
            return False
        self._said[key] = now + _REPEAT_SECONDS
        return True


class _Handler(logging.StreamHandler[TextIO]):
    """Names the place of a call whose arguments do not fit. `logging` would print them as they are."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        # If this line cannot be written, none can.
        if record.name != __name__:
            error = sys.exc_info()[1]
            place = f"{record.pathname}:{record.lineno}"
            structlog.get_logger().error("a line could not be logged", place=place, error=type(error).__name__)
