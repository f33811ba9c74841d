"""Processes that are newer than their schema wait until it is migrated."""

import threading
from collections.abc import Sequence
from pathlib import Path

import psycopg
import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from dovecote.migrations.revisions import HEADS, pending_for
from dovecote.telemetry.failures import is_transient

log = structlog.get_logger()

WAITING = "waiting for the schema, which is older than this code: run `dovecote migrate`"


def await_current(engine: Engine, stopping: threading.Event, locations: Sequence[Path]) -> bool:
    """Wait until the schema is as new as this code, and log it meanwhile; False when `stopping` is set before.

    Errors: DBAPIError when there is no schema at all.
    """
    tries = 0
    while wanted := _wanted(engine, locations):
        if tries % 60 == 0:
            log.warning(WAITING, newest=wanted)
        tries += 1
        if stopping.wait(1.0):
            return False
    return True


def _wanted(engine: Engine, locations: Sequence[Path]) -> str | None:
    """Return the newest revision while it is not applied, None once it is; `postgres` while that is away."""
    try:
        with engine.connect() as connection:
            applied: Sequence[str] | None = connection.exec_driver_sql(HEADS).scalar_one()
            waiting = pending_for(applied, locations=locations)
    except DBAPIError as error:
        if is_transient(error):
            return "postgres itself"
        if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise
        waiting = pending_for(None, locations=locations)  # the first revision grants the right to look
    return waiting[-1] if waiting else None
