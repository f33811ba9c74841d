"""Weeks of events in every state, and `maintain` at any time: nothing that is needed is dropped, all else is."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Engine, text

from dovecote.operations import archive, retention
from tests.support.past_weeks import an_old_id, fail, process, publish_all, subscribe, suffix, write_old
from tests.support.profiles import examples

WANTED, NEWER, UNWANTED = "test.noted.v1", "test.noted.v2", "test.of_nobody.v1"
KEEP_WEEKS = 2


@dataclass
class Known:
    """What the model knows of one event."""

    id: UUID
    week: int
    type: str
    position: int
    published: bool = False
    state: str = "untouched"  # or processed, discarded, retrying, waiting, dead


@dataclass
class World:
    """What should be true."""

    events: list[Known] = field(default_factory=list)
    dropped: list[Known] = field(default_factory=list)
    gone_weeks: set[str] = field(default_factory=set)
    knows_newer: bool = False
    replay_at: int | None = None

    def is_needed(self, event: Known) -> bool:
        if not event.published or event.state in ("retrying", "waiting", "dead"):
            return True
        if self.replay_at is not None and self.replay_at < event.position:
            return True
        if event.type == NEWER and not self.knows_newer:
            return True
        return event.type != UNWANTED and event.state not in ("processed", "discarded")


class Weeks(RuleBasedStateMachine):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.world = World()
        self.place = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="dovecote-test-"))
        with engine.begin() as connection:
            connection.execute(
                text(
                    "truncate dovecote.outbox, dovecote.processed_events, dovecote.published_batches,"
                    " dovecote.deliveries, dovecote.subscriptions, dovecote.replays, dovecote.dropped_partitions"
                )
            )
            connection.execute(text("update dovecote.relay_state set checkpoint = 0"))
            connection.execute(text("alter sequence dovecote.outbox_position restart"))
        subscribe(engine, event_type=WANTED)

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    def some(self, data: st.DataObject, wanted: Callable[[Known], bool]) -> Known | None:
        found = [event for event in self.world.events if wanted(event)]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(week=st.sampled_from([1, 3, 4, 5]), type=st.sampled_from([WANTED, WANTED, NEWER, UNWANTED]))
    def write(self, week: int, type: str) -> None:
        if suffix(week) in self.world.gone_weeks:
            return
        one = an_old_id(week)
        with self.engine.begin() as connection:
            (position,) = write_old(connection, [one], type)
        self.world.events.append(Known(one, week, type, position))

    @rule()
    def publish(self) -> None:
        with self.engine.begin() as connection:
            publish_all(connection)
        for event in self.world.events:
            event.published = True

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        """A handler does it, at once or after failures."""
        event = self.some(
            data, lambda one: one.published and one.type == WANTED and one.state not in ("processed", "discarded")
        )
        if event:
            with self.engine.begin() as connection:
                process(connection, [event.id])
                connection.execute(text("delete from dovecote.deliveries where event_id = :id"), {"id": event.id})
            event.state = "processed"

    @rule(data=st.data(), state=st.sampled_from(["retrying", "waiting", "dead"]))
    def go_wrong(self, data: st.DataObject, state: str) -> None:
        event = self.some(data, lambda one: one.published and one.type == WANTED and one.state == "untouched")
        if event:
            with self.engine.begin() as connection:
                fail(connection, event.id, state)
            event.state = state

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        event = self.some(data, lambda one: one.state == "dead")
        if event:
            with self.engine.begin() as connection:
                connection.execute(
                    text("update dovecote.deliveries set state = 'discarded' where event_id = :id"), {"id": event.id}
                )
            event.state = "discarded"

    @precondition(lambda self: not self.world.knows_newer)
    @rule()
    def deploy_code_that_knows_the_newer_version(self) -> None:
        subscribe(self.engine, event_type=NEWER)
        with self.engine.begin() as connection:
            mine = [event for event in self.world.events if event.type == NEWER and event.published]
            process(connection, [event.id for event in mine])
        for event in mine:
            event.state = "processed"
        self.world.knows_newer = True

    @precondition(lambda self: self.world.replay_at is None)
    @rule(data=st.data(), state=st.sampled_from(["pending", "running", "paused"]))
    def start_a_replay(self, data: st.DataObject, state: str) -> None:
        at = data.draw(st.integers(0, len(self.world.events)))
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "insert into dovecote.replays"
                    " (actor, reason, mode, handler_name, filter, state, cursor_position)"
                    " values ('a test', 'because', 'reprocess', 'test.note', '{}', :state, :at)"
                ),
                {"state": state, "at": at},
            )
        self.world.replay_at = at

    @precondition(lambda self: self.world.replay_at is not None)
    @rule(state=st.sampled_from(["done", "cancelled"]))
    def end_the_replay(self, state: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(
                text("update dovecote.replays set state = :state where state in ('pending', 'running', 'paused')"),
                {"state": state},
            )
        self.world.replay_at = None

    @rule(dry_run=st.booleans())
    def maintain(self, dry_run: bool) -> None:
        world = self.world
        old = [event for event in world.events if event.week > KEEP_WEEKS]
        needed = {suffix(event.week) for event in old if world.is_needed(event)}
        free = {suffix(event.week) for event in old} - needed
        if dry_run:  # it sees partitions only; what has none yet is seen by the next real one
            before = self.present()
            done = retention.maintain(self.engine, actor="a test", keep_weeks=KEEP_WEEKS, dry_run=True)
            assert not needed & {week.week for week in done.dropped}
            assert self.present() == before
            return

        done = retention.maintain(self.engine, actor="a test", keep_weeks=KEEP_WEEKS, archive_dir=self.place)

        assert {week.week for week in done.dropped if week.events} == free
        assert {week.week for week in done.held} == needed
        for week in done.dropped:
            went = {str(event.id): event for event in old if suffix(event.week) == week.week}
            archived = list(archive.rows(Path(str(week.archive)), "outbox"))
            assert sorted(row["id"] for row in archived) == sorted(went)
            marked = {row["event_id"] for row in archive.rows(Path(str(week.archive)), "processed_events")}
            assert marked == {id for id, event in went.items() if event.state == "processed"}
            discarded = {row["event_id"] for row in archive.rows(Path(str(week.archive)), "discarded_deliveries")}
            assert discarded == {id for id, event in went.items() if event.state == "discarded"}
        world.gone_weeks |= {week.week for week in done.dropped}
        world.dropped += [event for event in old if suffix(event.week) in free]
        world.events = [event for event in world.events if suffix(event.week) not in free or event.week <= KEEP_WEEKS]

    def present(self) -> set[UUID]:
        with self.engine.connect() as connection:
            return set(connection.execute(text("select id from dovecote.outbox")).scalars())

    @invariant()
    def everything_needed_is_there_with_its_dedup(self) -> None:
        assert self.present() == {event.id for event in self.world.events}
        with self.engine.connect() as connection:
            marked = set(connection.execute(text("select event_id from dovecote.processed_events")).scalars())
            published = set(
                connection.execute(
                    text("select id from dovecote.outbox_events where published_at is not null")
                ).scalars()
            )
        assert marked == {event.id for event in self.world.events if event.state == "processed"}
        assert published == {event.id for event in self.world.events if event.published}

    @invariant()
    def what_is_gone_is_new_to_nobody(self) -> None:
        if not self.world.dropped:
            return
        with self.engine.begin() as connection:
            process(connection, [event.id for event in self.world.dropped])


def test_nothing_needed_is_dropped_and_nothing_else_is_kept(engine: Engine) -> None:
    class WeeksHere(Weeks):
        def __init__(self) -> None:
            super().__init__(engine)

    run_state_machine_as_test(
        WeeksHere,
        settings=settings(
            max_examples=examples(25, 200),
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
