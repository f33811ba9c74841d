"""What Redis has lost is found in steps, from the low-water marks on, and sent as it was sent first."""

import tracemalloc
from collections.abc import Sequence

import pytest

from dovecote.broker.publisher import QueuedBundle
from dovecote.relay import recovery
from dovecote.relay.bundler import Bundler
from dovecote.store import progress, published_batches
from dovecote.store.positions import multirange
from dovecote.store.reader import Reader
from tests.support.effects import a_route
from tests.support.outbox_rows import Connection

pytestmark = pytest.mark.servers

TYPE = "pricing.price_quoted.v1"
NOTE, MAIL = a_route("test.note", bundle_size=10), a_route("test.mail", queue="mail", bundle_size=7)
ROUTES = (NOTE, MAIL)


def write(connection: Connection, events: int, event_type: str = TYPE) -> None:
    connection.execute(
        "insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)"
        " select 'price', 'A' || n %% 10, %s, '{}' from generate_series(1, %s) n",
        (event_type, events),
    )
    (last,) = connection.execute("select last_value from dovecote.outbox_position").fetchone() or (0,)
    connection.execute("update dovecote.relay_state set checkpoint = %s", (last,))


def subscribe(connection: Connection, since: int = 0, published_above: str = "{}") -> None:
    for route in ROUTES:
        connection.execute(
            "insert into dovecote.subscriptions (handler_name, event_type, since_position, published_above)"
            " values (%s, %s, %s, %s)",
            (route.handler, TYPE, since, published_above),
        )


def publish(connection: Connection, numbers: Sequence[int]) -> list[QueuedBundle]:
    """Record a batch as the leader does; return its messages."""
    connection.execute(
        "insert into dovecote.published_batches (positions, events, epoch) values (%s, %s, 1)",
        (multirange(numbers), len(numbers)),
    )
    return list(Bundler(ROUTES).bundles(reader_of(connection).rows_in(multirange(numbers))))


def settle(connection: Connection, handler: str, low: int, high: int) -> None:
    connection.execute(
        "insert into dovecote.processed_events (event_id, handler_name)"
        " select id, %s from dovecote.outbox where position between %s and %s",
        (handler, low, high),
    )


def reader_of(connection: Connection) -> Reader:
    (last,) = connection.execute("select last_value from dovecote.outbox_position").fetchone() or (0,)
    return Reader(connection, last, 2_000)


def found(connection: Connection, upto: dict[str, int] | None = None) -> list[str]:
    reader = reader_of(connection)
    return [bundle.id for bundle in recovery.bundles(connection, reader, Bundler(ROUTES), ROUTES, upto=upto)]


def ids(bundles: Sequence[QueuedBundle]) -> list[str]:
    return [bundle.id for bundle in bundles]


@pytest.mark.parametrize("events_of_a_step", [3, 5_000])
def test_batches_are_sent_once_in_the_order_they_were_published_cut_as_they_were(
    relays: Connection, monkeypatch: pytest.MonkeyPatch, events_of_a_step: int
) -> None:
    monkeypatch.setattr(recovery, "_EXAMINED_EVENTS", events_of_a_step)
    for name in ("_SCANNED_EVENTS", "_BATCHES"):
        monkeypatch.setattr(published_batches, name, events_of_a_step)
    subscribe(relays)
    write(relays, 150)
    # 20 was late, the third batch came with what had turned up in gaps, and the last is of single events.
    first = publish(relays, [*range(1, 20), *range(21, 50)])
    second = publish(relays, range(61, 101))
    third = publish(relays, [20, *range(50, 61), *range(101, 140)])
    singles = [one for number in range(140, 151) for one in publish(relays, [number])]
    everything = ids([*first, *second, *third, *singles])

    assert found(relays) == everything

    settle(relays, NOTE.handler, 1, 49)
    done = {one.id for one in first if one.handler == NOTE.handler}
    assert found(relays) == [id for id in everything if id not in done]


def test_the_search_begins_at_the_mark_and_where_there_is_none_with_the_subscription(relays: Connection) -> None:
    subscribe(relays, since=10)
    write(relays, 60)
    batches = [publish(relays, range(n, n + 10)) for n in range(1, 60, 10)]
    assert found(relays) == ids([one for batch in batches[1:] for one in batch])

    # Not true, and so to be seen: what lies below `examined` and outside of `open` is not asked for.
    relays.execute("update dovecote.progress set examined = 50, open = '{[25,26)}'")
    assert found(relays) == ids([*batches[2], *batches[5]])

    relays.execute("delete from dovecote.progress")
    assert found(relays) == ids([one for batch in batches[1:] for one in batch])


def test_what_is_left_for_later_is_not_sent(relays: Connection) -> None:
    subscribe(relays)
    write(relays, 40)
    batches = [publish(relays, range(n, n + 10)) for n in (1, 11, 21, 31)]

    assert found(relays, {MAIL.handler: 10}) == [
        one.id for n, batch in enumerate(batches) for one in batch if one.handler == NOTE.handler or n == 0
    ]


def test_what_is_in_no_batch_though_the_checkpoint_has_passed_it_is_sent_and_a_second_try_is_the_same(
    relays: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published_batches, "_SCANNED_EVENTS", 40)  # several steps in a block
    subscribe(relays)
    write(relays, 2_020)
    batch = publish(relays, range(101, 1_991))
    settle(relays, NOTE.handler, 101, 1_990)
    settle(relays, MAIL.handler, 101, 1_990)

    tried = found(relays)

    assert not set(tried) & set(ids(batch))
    rows = [reader_of(relays).rows_in(part) for part in ("{[1,101),[1991,2000)}", "{[2000,2021)}")]
    assert tried == [one.id for part in rows for one in Bundler(ROUTES).bundles(part)]

    # What some have acted on before the next try does not move the cuts.
    settle(relays, NOTE.handler, 1, 15)
    again = found(relays)
    assert len(again) == len(tried) - 1
    assert set(again) < set(tried)

    # Above the checkpoint it may be about to be published.
    relays.execute("update dovecote.relay_state set checkpoint = 50")
    below = Bundler(ROUTES).bundles(reader_of(relays).rows_in("{[1,51)}"))
    assert found(relays) == [one.id for one in below if one.id not in set(tried) - set(again)]


def test_what_a_handler_does_not_want_is_not_missing_among_what_it_wants(relays: Connection) -> None:
    subscribe(relays, since=5, published_above="{[50,60)}")
    relays.execute(
        "insert into dovecote.subscriptions (handler_name, event_type, since_position) values (%s, %s, 120)",
        (NOTE.handler, "test.other.v1"),
    )
    write(relays, 100)
    write(relays, 30, "test.other.v1")
    write(relays, 20, "pricing.price_quoted.v9")  # of a version that nobody knows yet

    unsettled = progress.unfinished(relays, [NOTE.handler, MAIL.handler], "{[1,1000)}")

    wanted = [*range(6, 50), *range(60, 101)]
    assert unsettled == {NOTE.handler: [*wanted, *range(121, 131)], MAIL.handler: wanted}


def test_three_times_as_much_that_is_lost_takes_no_more_memory(relays: Connection) -> None:
    subscribe(relays)
    peaks = []
    for events in (8_000, 24_000):
        relays.execute("truncate dovecote.outbox, dovecote.published_batches")
        relays.execute("alter sequence dovecote.outbox_position restart")
        relays.execute("update dovecote.progress set examined = 0, open = '{}'")
        write(relays, events)
        relays.execute(
            "insert into dovecote.published_batches (positions, events, epoch)"
            " select int8multirange(int8range(n, n + 500)), 500, 1 from generate_series(1, %s, 500) n",
            (events,),
        )
        reader = reader_of(relays)
        tracemalloc.start()
        sent = sum(1 for _ in recovery.bundles(relays, reader, Bundler([NOTE]), [NOTE]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert sent == events // 10

    assert peaks[1] < 1.2 * peaks[0], peaks
