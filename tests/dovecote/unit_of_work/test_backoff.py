"""Pauses double from the first to the longest, less some jitter; long outages are logged seldom."""

from dovecote.unit_of_work.backoff import Backoff


def test_a_pause_doubles_up_to_the_longest() -> None:
    backoff = Backoff(first_seconds=0.1, max_seconds=0.5)

    assert [backoff.pause_seconds(tries) for tries in (1, 2, 3, 4, 10_000)] == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_jitter_takes_off_no_more_than_its_part() -> None:
    backoff = Backoff(first_seconds=1.0, max_seconds=4.0, jitter=0.5)

    pauses = {backoff.pause_seconds(2) for _ in range(200)}

    assert len(pauses) > 100
    assert all(1.0 <= pause <= 2.0 for pause in pauses)


def test_a_long_outage_is_logged_seldom() -> None:
    backoff = Backoff(first_seconds=0.1, max_seconds=1.0, log_first=3)

    logged = [tries for tries in range(1, 1_000) if backoff.should_log(tries)]

    assert logged == [3, 30, 300, 600, 900]
