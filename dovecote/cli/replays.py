"""`dovecote replay`: send events to a handler again."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol
from uuid import UUID

import typer
from rich.progress import TaskProgressColumn, TimeRemainingColumn

from dovecote import operations
from dovecote.cli.options import (
    Actor,
    AggregateId,
    AggregateType,
    Before,
    DryRun,
    Handler,
    Limit,
    Reason,
    Since,
    Until,
    complete_event_type,
    complete_handler,
)
from dovecote.cli.output import (
    AsJson,
    jsonable,
    note,
    print_json,
    print_listing,
    progress_bar,
    render,
    say,
    shows_progress,
)
from dovecote.cli.system import database, routes
from dovecote.errors import shown
from dovecote.processes.terminal import plain, refuse

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dovecote.operations.replays import Plan, Replay

_WATCH_SECONDS = 0.25


class Mode(Enum):
    backfill = "backfill"
    reprocess = "reprocess"


Watch = Annotated[bool, typer.Option("--watch", help="Stay until it is over; Ctrl-C leaves it running.")]
Id = Annotated[UUID, typer.Argument(help="The replay's id.")]


replay = typer.Typer(no_args_is_help=True, help="Send events to a handler again.")


@replay.command()
def start(
    handler: Annotated[str, typer.Option(help="Which handler is to have them.", autocompletion=complete_handler)],
    reason: Annotated[str, typer.Option(help="Why; it is written into the audit log.")],
    actor: Actor,
    mode: Annotated[
        Mode,
        typer.Option(help="backfill: what it has not acted on. reprocess: have it act once more on what it has."),
    ] = Mode.backfill,
    type: Annotated[
        list[str] | None,
        typer.Option(help="Event type; may be given often.", autocompletion=complete_event_type),
    ] = None,
    aggregate_type: AggregateType = None,
    aggregate_id: AggregateId = None,
    since: Since = None,
    until: Until = None,
    from_position: Annotated[int | None, typer.Option(min=1, help="The first position.")] = None,
    upto_position: Annotated[int | None, typer.Option(min=1, help="The last position.")] = None,
    ids_from: Annotated[
        Path | None, typer.Option(help="File with one event id a line; - reads standard input.")
    ] = None,
    rate: Annotated[
        int | None, typer.Option(min=1, help="Most events a second; as fast as they go if not given.")
    ] = None,
    dry_run: DryRun = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Have the relay send events to a handler again. On a terminal it shows the progress; Ctrl-C leaves it running.

    Example: dovecote replay start --handler billing.write_history --since 2026-11-20 --reason "INC-7"
    """
    request = operations.replays.Request(
        handler=handler,
        mode=mode.value,
        filter=operations.replays.ReplaySelection(
            event_types=tuple(type) if type else None,
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
            since=since,
            until=until,
            from_position=from_position,
            upto_position=upto_position,
        ),
        event_ids=_ids(ids_from) if ids_from else None,
        rate=rate,
        reason=reason,
        actor=actor,
    )
    with database() as engine:
        plan = (operations.replays.plan if dry_run else operations.replays.start)(engine, routes(), request)
        if as_json:
            print_json(plan)
        else:
            _print_plan(plan, dry_run)
        if plan.replay_id and (watch or (shows_progress() and not as_json)):
            _watch(engine, plan.replay_id, as_json)


@replay.command("list")
def list_(
    handler: Handler = None,
    before: Before = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List replays, the newest first.

    Example: dovecote replay list --handler billing.write_history
    """
    with database() as engine:
        page = operations.replays.list_replays(engine, routes=routes(), handler=handler, before=before, limit=limit)
    render(
        page,
        {
            "id": lambda one: one.id,
            "handler": lambda one: one.handler,
            "mode": lambda one: one.mode,
            "state": lambda one: one.state,
            "done": lambda one: one.done,
            "of": lambda one: one.total,
            "failed": lambda one: one.retrying + one.waiting + one.dead,
            "began": lambda one: f"{one.created_at:%F %T}",
            "actor": lambda one: one.actor,
            "reason": lambda one: one.reason,
        },
        name="replays",
        right=("done", "of", "failed"),
        if_empty="nothing was replayed",
        as_json=as_json,
    )


@replay.command()
def show(id: Id, watch: Watch = False, as_json: AsJson = False) -> None:
    """Show one replay; with --watch, come back to its progress.

    Example: dovecote replay show 0198c5f0-7c3e-7b1a-9a52-3f1f0c9d8e21 --watch
    """
    with database() as engine:
        found = operations.replays.get_replay(engine, id)
        if watch and not found.is_over:
            _watch(engine, id, as_json)
        elif as_json:
            print_json(found)
        else:
            _print(found)


class _Verb(Protocol):
    def __call__(self, engine: Engine, id: UUID, *, actor: str, reason: str | None, dry_run: bool) -> Replay: ...


@replay.command()
def pause(
    id: Id,
    actor: Actor,
    reason: Reason = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Send no more of a replay for now.

    Example: dovecote replay pause 0198c5f0-7c3e-7b1a-9a52-3f1f0c9d8e21
    """
    _change(operations.replays.pause, id, actor, reason, dry_run, as_json)


@replay.command()
def resume(
    id: Id,
    actor: Actor,
    reason: Reason = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a paused replay, from where it was.

    Example: dovecote replay resume 0198c5f0-7c3e-7b1a-9a52-3f1f0c9d8e21
    """
    _change(operations.replays.resume, id, actor, reason, dry_run, as_json)


@replay.command()
def cancel(
    id: Id,
    actor: Actor,
    reason: Reason = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """End a replay and forget its retries. What was acted on stays.

    Example: dovecote replay cancel 0198c5f0-7c3e-7b1a-9a52-3f1f0c9d8e21 --reason "wrong day"
    """
    _change(operations.replays.cancel, id, actor, reason, dry_run, as_json)


def _change(verb: _Verb, id: UUID, actor: str, reason: str | None, dry_run: bool, as_json: bool) -> None:
    with database() as engine:
        found = verb(engine, id, actor=actor, reason=reason, dry_run=dry_run)
    if as_json:
        print_json({**jsonable(found), "dry_run": dry_run})
    elif dry_run:
        say(f"replay {id} is {found.state}, {found.done} of {found.total} done; it would be changed")
    else:
        _print(found)


def _watch(engine: Engine, id: UUID, as_json: bool) -> None:
    bar = progress_bar(as_json, TaskProgressColumn(), TimeRemainingColumn())
    try:
        with bar:
            found = operations.replays.get_replay(engine, id)
            task = bar.add_task(plain(found.handler), total=found.total, completed=found.done)
            while not found.is_over:
                time.sleep(_WATCH_SECONDS)  # the pace of the display
                found = operations.replays.get_replay(engine, id)
                bar.update(
                    task,
                    completed=found.done,
                    description=plain(f"{found.handler} {found.state}{_standstill(found)}"),
                )
    except KeyboardInterrupt:
        note(f"left; the replay goes on in the relay. Come back: dovecote replay show {id} --watch")
        return
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print_plan(plan: Plan, dry_run: bool) -> None:
    say(
        f"{'would replay' if dry_run else 'replaying'} {plan.events} events for {plan.handler} ({plan.mode}), "
        f"positions {plan.first_position} to {plan.last_position}"
        + (f"; {plan.left_alone} in deliveries are left alone" if plan.left_alone else "")
    )
    if plan.replay_id:
        say(f"replay {plan.replay_id}")
        return
    print_listing(
        plan.sample,
        {
            "position": lambda event: event.position,
            "type": lambda event: event.event_type,
            "aggregate": lambda event: f"{event.aggregate_type} {event.aggregate_id}",
            "id": lambda event: event.event_id,
        },
        if_empty="",
    )


def _print(replay: Replay) -> None:
    say(f"replay {replay.id}: {replay.handler}, {replay.mode}, {replay.state}")
    pace = f", {replay.events_per_second:.0f}/s" if replay.events_per_second and replay.done else ""
    say(f"  {replay.done} of {replay.total} done, {replay.acted} acted on{pace}")
    failed = ((replay.retrying, "retrying"), (replay.waiting, "waiting"), (replay.dead, "dead"))
    if any(count for count, _ in failed):
        say("  failed: " + ", ".join(f"{count} {state}" for count, state in failed if count))
    if why := _standstill(replay):
        say(f"  {why.removeprefix('; ')}")
    say(f"  by {replay.actor}: {replay.reason}")


def _ids(file: Path) -> list[UUID]:
    try:
        text = typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"{file}: it cannot be read: {error}")
    ids = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            ids.append(UUID(line.strip()))
        except ValueError:
            refuse(f"{file}, line {number}: {shown(line.strip(), 60)} is no event id; one UUID a line is wanted")
    return ids


def _standstill(replay: Replay) -> str:
    if replay.problem is not None:
        return f"; this relay does not understand it: {replay.problem}" if not replay.is_over else f"; {replay.problem}"
    if replay.handler_is_paused and not replay.is_over:
        return "; waits: its handler is paused"
    if replay.stalled_seconds is not None:
        return f"; no event has finished for {replay.stalled_seconds:.0f} s: see `dovecote doctor`"
    return ""
