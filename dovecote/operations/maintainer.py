"""Once an hour the leading relay maintains partitions and removes expired personal data.

Beside its own work and on a connection of its own.
"""

import socket
import threading
from collections.abc import Sequence

import structlog
from sqlalchemy import Engine

from dovecote.operations import retention
from dovecote.operations.purging import purge
from dovecote.route import Purge, Route
from dovecote.settings import Settings
from dovecote.store.connections import NO_TIME_LIMITS, ONLY_OUR_NAMES, connect

log = structlog.get_logger()


class Maintainer:
    """Runs `dovecote maintain` as the settings say; one run at a time, whether or not it succeeds."""

    def __init__(self, settings: Settings, routes: Sequence[Route], purges: Sequence[Purge] = ()) -> None:
        self._settings = settings
        self._routes = routes
        self._purges = purges
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start a run unless the last one is still running. Returns at once."""
        if self._thread is None or not self._thread.is_alive():
            # A daemon: the relay need not wait for it. Killed at any point it leaves nothing half done.
            self._thread = threading.Thread(target=self._run, name="maintenance", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        database = self._settings.database
        engine = connect(
            database.url.get_secret_value(),
            pool_size=1,
            connect_timeout_seconds=database.connect_timeout_seconds,
            application_name="dovecote maintenance",
            session_settings={**NO_TIME_LIMITS, **ONLY_OUR_NAMES},
        )
        # Each whatever becomes of the other: no trouble with a week may keep personal data, nor the other way round.
        try:
            for work in (self._purge, self._maintain_partitions):
                try:
                    work(engine)
                except Exception as error:
                    # Four weeks of partitions are there: the next hour will do.
                    log.warning(
                        "maintenance failed; it is tried again in an hour", error=f"{type(error).__name__}: {error}"
                    )
        finally:
            engine.dispose()

    def _purge(self, engine: Engine) -> None:
        if removed := purge(engine, self._purges):
            log.info("personal data removed: its time was over", rows=removed)

    def _maintain_partitions(self, engine: Engine) -> None:
        wanted = self._settings.retention
        done = retention.maintain(
            engine,
            actor=f"relay@{socket.gethostname()}",
            keep_weeks=wanted.keep_weeks,
            archive_dir=wanted.archive_path,
            weeks_ahead=wanted.weeks_ahead,
            routes=self._routes,
        )
        for week in done.dropped:
            log.info("week dropped", week=week.week, events=week.events, archive=week.archive)
        for held in done.held:
            log.warning(
                "week held back",
                week=held.week,
                by=[f"{one.events} {one.what} {one.handler or ''}".strip() for one in held.blockers],
            )
