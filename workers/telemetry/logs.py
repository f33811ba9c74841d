"""One line an event, to stderr: for people on a terminal, JSON for machines. Masked as a finished line."""

import logging
import sys

import structlog
from dramatiq import Message
from dramatiq.broker import MessageProxy
from structlog.typing import Processor

from workers import settings as options
from workers.masking import masked


def configure_logs(telemetry: options.Telemetry, component: str) -> None:
    """Send one line an event to stderr, for people or for machines; the last call wins."""
    for_people = telemetry.log_format == "console" or (telemetry.log_format == "auto" and sys.stderr.isatty())
    level = getattr(logging, telemetry.log_level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if for_people else "iso", utc=not for_people),
        structlog.processors.format_exc_info,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, sort_keys=False)
        if for_people
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_name_messages)
    handler.setFormatter(
        _MaskingFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Libraries speak up when something is wrong; their small talk is for debugging.
    for name in ("dramatiq", "alembic", "opentelemetry"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if level > logging.DEBUG else level)
    structlog.contextvars.clear_contextvars()
    if not for_people:
        structlog.contextvars.bind_contextvars(component=component)


def _name_messages(record: logging.LogRecord) -> bool:
    """Let Dramatiq's own lines name a message instead of printing it: it holds hundreds of payloads."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            f"{value.actor_name} {value.message_id}" if isinstance(value, Message | MessageProxy) else value
            for value in record.args
        )
    return True


class _MaskingFormatter(structlog.stdlib.ProcessorFormatter):
    """Masks the finished line, so that nothing escapes: no value, no traceback, no library's own words."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))
