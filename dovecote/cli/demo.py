"""`dovecote demo` of the built-in application, and what an application needs for a demo of its own."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from dovecote.cli.output import AsJson, print_json, progress_bar, say
from dovecote.processes.state_directory import StateDirectory
from dovecote.processes.stop_flag import StopFlag
from dovecote.settings.application import BUILT_IN_APP, app_name

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dovecote.local.demonstration import Progress, Report
    from dovecote.settings import Settings

    #: Runs a demo on a database and reports what became of its events.
    Demo = Callable[[Settings, Engine, int, float, Progress], Report]

Events = Annotated[int, typer.Option(min=1, max=10_000_000, help="How many events.")]
Timeout = Annotated[float, typer.Option(min=1, help="How long to wait for the last effect.")]


def demo(events: Events = 1_000, timeout_seconds: Timeout = 300.0, as_json: AsJson = False) -> None:
    """Write events and wait until each is processed, once.

    Uses the running system, or runs one of its own meanwhile. Exit code 1 if an event is lost.

    Example: dovecote demo --events 10000
    """

    def run(_: Settings, engine: Engine, events: int, timeout_seconds: float, progress: Progress) -> Report:
        from dovecote.local.demo import use_cases
        from dovecote.local.demonstration import Demonstration

        demonstration = Demonstration.begin(engine)
        scenario = use_cases(demonstration.run_id)
        return demonstration.run(scenario, events, timeout_seconds=timeout_seconds, progress=progress)

    run_demo(run, events, timeout_seconds, as_json)


def run_demo(run: Demo, events: int, timeout_seconds: float, as_json: bool) -> None:
    """Run it on the running system, or on one of its own, and print the report. Exit code 1 if it is not sound."""
    from dovecote.settings import load_settings

    if _is_led():
        report = _with_bar(run, load_settings(), events, timeout_seconds, as_json)
    else:
        report = _in_own_system(run, events, timeout_seconds, as_json)
    if as_json:
        print_json(report)
    else:
        say(
            f"{report.written} written, {report.published} published, {report.processed} processed, "
            f"{report.lost} lost, {report.duplicated} duplicated, in {report.seconds} s"
        )
    if not report.is_sound:
        raise typer.Exit(1)


def _with_bar(run: Demo, settings: Settings, events: int, timeout_seconds: float, as_json: bool) -> Report:
    from dovecote.store.engines import engine_during

    with engine_during(settings) as engine, progress_bar(as_json) as bar:
        written_task = bar.add_task("written", total=events)
        processed_task = bar.add_task("processed", total=events)

        def progress(written: int, processed: int) -> None:
            bar.update(written_task, completed=written)
            bar.update(processed_task, completed=processed)

        return run(settings, engine, events, timeout_seconds, progress)


def _in_own_system(run: Demo, events: int, timeout_seconds: float, as_json: bool) -> Report:
    """Supervise from the main thread, as children must be, and write from another."""
    from dovecote.local.supervisor import prefixed, stop_on_signals
    from dovecote.local.system import STOP_SECONDS, local_system
    from dovecote.settings import load_settings

    outcome: list[Report | BaseException] = []

    def write(settings: Settings, done: StopFlag) -> None:
        try:
            outcome.append(_with_bar(run, settings, events, timeout_seconds, as_json))
        except BaseException as error:  # handed to the main thread
            outcome.append(error)
        finally:
            done.set()

    app = app_name() or BUILT_IN_APP
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
