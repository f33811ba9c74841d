"""`dovecote demo`: write events of the three slices and wait for their effects."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from dovecote.cli.output import AsJson, print_json, progress_bar, say
from dovecote.processes.state_directory import StateDirectory
from dovecote.processes.stop_flag import StopFlag

if TYPE_CHECKING:
    from dovecote.settings import Settings
    from workers import demo as demonstration


def demo(
    events: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many events.")] = 1_000,
    timeout_seconds: Annotated[float, typer.Option(min=1, help="How long to wait for the last effect.")] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Write mixed events of the three slices and wait until every one is an effect, once.

    Uses the running system, or runs one of its own meanwhile. Exit code 1 if an event is lost or handled twice.

    Example: dovecote demo --events 10000
    """
    from dovecote.settings import load_settings

    if _is_led():
        report = _demo(load_settings(), events, timeout_seconds, as_json)
    else:
        report = _demo_in_own_system(events, timeout_seconds, as_json)
    if as_json:
        print_json(report)
    else:
        say(
            f"{report.written} written, {report.published} published, {report.processed} processed, "
            f"{report.lost} lost, {report.duplicated} duplicated, in {report.seconds} s"
        )
    if not report.is_sound:
        raise typer.Exit(1)


def _demo(settings: Settings, events: int, timeout_seconds: float, as_json: bool) -> demonstration.Report:
    from dovecote.store.engines import engine_during
    from workers import demo as demonstration

    with engine_during(settings) as engine, progress_bar(as_json) as bar:
        written_task = bar.add_task("written", total=events)
        processed_task = bar.add_task("processed", total=events)

        def progress(written: int, processed: int) -> None:
            bar.update(written_task, completed=written)
            bar.update(processed_task, completed=processed)

        return demonstration.run(engine, settings.keyring(), events, timeout_seconds=timeout_seconds, progress=progress)


def _demo_in_own_system(events: int, timeout_seconds: float, as_json: bool) -> demonstration.Report:
    """Supervise from the main thread, as children must be, and write from another."""
    from dovecote.local.supervisor import prefixed, stop_on_signals
    from dovecote.local.system import STOP_SECONDS, local_system
    from dovecote.settings import load_settings
    from workers.app import app

    outcome: list[demonstration.Report | BaseException] = []

    def write(settings: Settings, done: StopFlag) -> None:
        try:
            outcome.append(_demo(settings, events, timeout_seconds, as_json))
        except BaseException as error:  # handed to the main thread
            outcome.append(error)
        finally:
            done.set()

    with stop_on_signals() as stop, local_system(os.environ, lambda _: None, app) as system:
        settings = load_settings(system.environment)
        supervisor = system.supervisor(prefixed(system.processes, sys.stderr))
        supervisor.start()
        try:
            writer = threading.Thread(target=write, args=(settings, stop), daemon=True)
            writer.start()
            supervisor.run_until(stop)
        finally:
            supervisor.stop(STOP_SECONDS)
    if not outcome:
        raise SystemExit(1)  # a signal ended it
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _is_led() -> bool:
    """Return whether there is a system to be used, with a leading relay."""
    import psycopg
    import sqlalchemy.exc

    from dovecote import operations
    from dovecote.settings import given_variables, load_settings
    from dovecote.store.engines import engine_during

    given = given_variables(os.environ)
    if not given.get("DOVECOTE_DATABASE__URL") and StateDirectory.locate(os.environ).running() is None:
        return False
    with (
        suppress(psycopg.errors.UndefinedTable, sqlalchemy.exc.ProgrammingError),
        engine_during(load_settings()) as engine,
    ):
        return operations.status.get_status(engine, ()).relay.leading
    return False
