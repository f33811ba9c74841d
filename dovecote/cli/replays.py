"""Commands that send events again."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol
from uuid import UUID

import typer
from rich.progress import TaskProgressColumn, TimeRemainingColumn
from rich.table import Table

from dovecote.cli.options import (
    Actor,
    AggregateId,
    AggregateType,
    DryRun,
    Handler,
    Limit,
    Reason,
    Since,
    Until,
    complete_event_type,
    complete_handler,
)
from dovecote.cli.output import AsJson, add_row, note, print_json, print_table, progress_bar, say, shows_progress
from dovecote.errors import shown
from dovecote.processes.terminal import plain, refuse

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dovecote.operations import replays


_WATCH_SECONDS = 0.25


class Mode(Enum):
    backfill = "backfill"
    reprocess = "reprocess"


Watch = Annotated[bool, typer.Option("--watch", help="Stay until it is over; Ctrl-C leaves it running.")]
Id = Annotated[UUID, typer.Argument(help="The replay's id.")]


def register(app: typer.Typer) -> None:
    replay = typer.Typer(no_args_is_help=True, help="Send events to a handler again.")
    for command in (start, pause, resume, cancel, show):
        replay.command()(command)
    replay.command("list")(list_)
    app.add_typer(replay, name="replay")


def start(
    handler: Annotated[str, typer.Option(help="Which handler is to have them.", autocompletion=complete_handler)],
    reason: Annotated[str, typer.Option(help="Why; it is written into the audit log.")],
    actor: Actor,
    mode: Annotated[
        Mode,
        typer.Option(help="missing: what it has not acted on. again: have it act once more on what it has."),
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
    from dovecote.operations import replays
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during
    from dovecote.store.replays import Filter

    request = replays.Request(
        handler=handler,
        mode=mode.value,
        filter=Filter(
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
    with engine_during(load_settings(needs_redis=False)) as engine:
        plan = (replays.plan if dry_run else replays.start)(engine, find_app().routes, request)
        if as_json:
            print_json(plan.as_json())
        else:
            _print_plan(plan, dry_run)
        if plan.replay_id and (watch or (shows_progress() and not as_json)):
            _watch(engine, plan.replay_id, as_json)


def list_(
    handler: Handler = None,
    before: Annotated[UUID | None, typer.Option(help="Go on where a page ended.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List replays, the newest first.

    Example: dovecote replay list --handler billing.write_history
    """
    from dovecote.operations import replays
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        page = replays.listed(engine, routes=find_app().routes, handler=handler, before=before, limit=limit)
    if as_json:
        print_json(page.as_json())
        return
    table = Table("id", "handler", "mode", "state", box=None, pad_edge=False)
    for column in ("done", "of", "failed"):
        table.add_column(column, justify="right")
    for column in ("began", "by", "reason"):
        table.add_column(column)
    for replay in page.replays:
        failed = replay.retrying + replay.waiting + replay.dead
        add_row(
            table,
            *(replay.id, replay.handler, replay.mode, replay.state, replay.done, replay.total, failed),
            *(f"{replay.created_at:%F %T}", replay.actor, replay.reason),
        )
    print_table(table, "nothing was replayed")
    if page.before:
        say(f"more: --before {page.before}")


def show(id: Id, watch: Watch = False, as_json: AsJson = False) -> None:
    """Show one replay; with --watch, come back to its progress.

    Example: dovecote replay show 0198c5f0-7c3e-7b1a-9a52-3f1f0c9d8e21 --watch
    """
    from dovecote.operations import replays
    from dovecote.settings import load_settings
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        replay = replays.shown(engine, id)
        if watch and not replay.is_over:
            _watch(engine, id, as_json)
        elif as_json:
            print_json(replay.as_json())
        else:
            _print(replay)


class _Verb(Protocol):
    def __call__(self, engine: Engine, id: UUID, *, by: str, reason: str | None, dry_run: bool) -> replays.Replay: ...


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
    from dovecote.operations import replays

    _change(replays.pause, id, actor, reason, dry_run, as_json)


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
    from dovecote.operations import replays

    _change(replays.resume, id, actor, reason, dry_run, as_json)


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
    from dovecote.operations import replays

    _change(replays.cancel, id, actor, reason, dry_run, as_json)


def _change(verb: _Verb, id: UUID, actor: str, reason: str | None, dry_run: bool, as_json: bool) -> None:
    from dovecote.settings import load_settings
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        replay = verb(engine, id, by=actor, reason=reason, dry_run=dry_run)
    if as_json:
        print_json({**replay.as_json(), "dry_run": dry_run})
    elif dry_run:
        say(f"replay {id} is {replay.state}, {replay.done} of {replay.total} done; it would be changed")
    else:
        _print(replay)


def _watch(engine: Engine, id: UUID, as_json: bool) -> None:
    from dovecote.operations import replays

    bar = progress_bar(as_json, TaskProgressColumn(), TimeRemainingColumn())
    try:
        with bar:
            replay = replays.shown(engine, id)
            task = bar.add_task(plain(replay.handler), total=replay.total, completed=replay.done)
            while not replay.is_over:
                time.sleep(_WATCH_SECONDS)
                replay = replays.shown(engine, id)
                bar.update(
                    task,
                    completed=replay.done,
                    description=plain(f"{replay.handler} {replay.state}{_standstill(replay)}"),
                )
    except KeyboardInterrupt:
        note(f"left; the replay goes on in the relay. Come back: dovecote replay show {id} --watch")
        return
    if as_json:
        print_json(replay.as_json())
    else:
        _print(replay)


def _print_plan(plan: replays.Plan, dry_run: bool) -> None:
    say(
        f"{'would replay' if dry_run else 'replaying'} {plan.events} events for {plan.handler} ({plan.mode}), "
        f"positions {plan.first_position} to {plan.last_position}"
        + (f"; {plan.left_alone} in deliveries are left alone" if plan.left_alone else "")
    )
    if plan.replay_id:
        say(f"replay {plan.replay_id}")
        return
    table = Table("position", "type", "aggregate", "id", box=None, pad_edge=False)
    for event in plan.sample:
        aggregate = f"{event.aggregate_type} {event.aggregate_id}"
        add_row(table, event.position, event.event_type, aggregate, event.event_id)
    print_table(table, "")


def _print(replay: replays.Replay) -> None:
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


def _standstill(replay: replays.Replay) -> str:
    if replay.problem is not None:
        return f"; this relay does not understand it: {replay.problem}" if not replay.is_over else f"; {replay.problem}"
    if replay.handler_is_paused and not replay.is_over:
        return "; waits: its handler is paused"
    if replay.stalled_seconds is not None:
        return f"; nothing was settled for {replay.stalled_seconds:.0f} s: see `dovecote doctor`"
    return ""
