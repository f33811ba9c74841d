"""Once an hour the leading relay looks after the weeks, beside its own work and on a connection of its own."""

import socket
import threading
from collections.abc import Sequence

import structlog

from domain.database import NO_TIME_LIMITS, ONLY_OUR_NAMES, connect
from workers.operations import retention
from workers.routes import Route
from workers.settings import Settings

log = structlog.get_logger()


class Maintainer:
    """Runs `dovecote maintain` as the settings say; one run at a time, whatever becomes of it."""

    def __init__(self, settings: Settings, routes: Sequence[Route]) -> None:
        self._settings = settings
        self._routes = routes
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin a run, unless the last one is still at it. Returns at once."""
        if self._thread is None or not self._thread.is_alive():
            # A daemon: the relay need not wait for it. Killed at any point it leaves nothing half done.
            self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        database, wanted = self._settings.database, self._settings.retention
        engine = connect(
            database.url.get_secret_value(),
            pool_size=1,
            connect_timeout_seconds=database.connect_timeout_seconds,
            application_name="dovecote maintenance",
            session_settings={**NO_TIME_LIMITS, **ONLY_OUR_NAMES},
        )
        try:
            done = retention.maintain(
                engine,
                by=f"relay@{socket.gethostname()}",
                keep_weeks=wanted.keep_weeks,
                archive_dir=wanted.archive_path,
                weeks_ahead=wanted.weeks_ahead,
                routes=self._routes,
            )
        except Exception as error:
            # Four weeks of partitions are there: the next hour will do.
            log.warning("maintenance failed; it is tried again in an hour", error=f"{type(error).__name__}: {error}")
            return
        finally:
            engine.dispose()
        for week in done.dropped:
            log.info("week dropped", week=week.week, events=week.events, archive=week.archive)
        for held in done.held:
            log.warning(
                "week held back",
                week=held.week,
                by=[f"{one.events} {one.what} {one.handler or ''}".strip() for one in held.obstacles],
            )
