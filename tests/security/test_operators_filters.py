"""A verb is called with a filter that means more than it says, or with SQL, nonsense, or too much of anything in it."""

from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

import pytest
from psycopg import errors
from psycopg.types.json import Jsonb

from tests.security.logins import CLAIMED, HANDLER, TYPE, VERBS, Database, fill, lines, logins_in, one, state_of

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def logins(database_url: str) -> Iterator[Database]:
    with logins_in(database_url) as database:
        yield database


@pytest.fixture
def database(logins: Database) -> Database:
    fill(logins)
    return logins


# What is claimed, and what is asked for -------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_line_has_a_name_of_somebody_and_no_more_than_a_screen_takes(database: Database, verb: str) -> None:
    before = state_of(database)
    with database.session("operator") as operator:
        for actor in (None, "", " ", "x" * 201, "ada\x1b]0;root\x07", "ada\nroot", "ada\x9b31m"):
            with pytest.raises(errors.InvalidParameterValue, match="audit log"):
                operator.execute(f"select {VERBS[verb][0]}", {**CLAIMED, "actor": actor})
        for reason in ("x" * 2_001, "why\x1b[2J", "why\x07"):
            with pytest.raises(errors.InvalidParameterValue, match="audit log"):
                operator.execute(f"select {VERBS[verb][0]}", {**CLAIMED, "reason": reason})
        if verb in ("discard", "pause", "start"):
            for no_reason in (None, "", " \n\t"):
                with pytest.raises(errors.InvalidParameterValue, match="needs a reason"):
                    operator.execute(f"select {VERBS[verb][0]}", {**CLAIMED, "reason": no_reason})

    assert state_of(database) == before


HOSTILE: list[tuple[Any, str]] = [
    (None, "an empty one, {}, asks for everything"),
    (Jsonb(None), "must be a JSON object"),
    (Jsonb([]), "must be a JSON object"),
    (Jsonb("handler"), "must be a JSON object"),
    (Jsonb({"colour": "red"}), 'unknown key, "colour"; known are aggregate_id'),
    (Jsonb({"x' or true; drop table dovecote.outbox --": 1}), "unknown key"),
    (Jsonb({"\x1b[2J" * 1000: 1}), "unknown key"),
    (Jsonb({"handler": None}), "handler must be a text, not null"),
    (Jsonb({"handler": ["a"]}), "handler must be a text"),
    (Jsonb({"handler": "x" * 30_000}), "more than 20000 characters"),
]


@pytest.mark.parametrize(("filter", "message"), HOSTILE)
@pytest.mark.parametrize("verb", ["retry", "discard"])
def test_a_filter_that_is_none_is_refused_in_words(database: Database, verb: str, filter: Any, message: str) -> None:
    before = state_of(database)
    with (
        database.session("operator") as operator,
        pytest.raises(errors.InvalidParameterValue, match=message) as refused,
    ):
        operator.execute(
            f"select dovecote.{verb}_deliveries('ada', 'why', %s::jsonb)",
            (filter,),
        )

    assert len(refused.value.diag.message_primary or "") < 300
    assert "\x1b" not in (refused.value.diag.message_primary or "")
    assert state_of(database) == before


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ({"since": "yesterday"}, "since must be a timestamp"),
        ({"since": "infinity"}, "since must be a timestamp"),
        ({"since": "2026-13-45T00:00:00Z"}, "since must be a timestamp"),
        ({"since": "2026-01-01T00:00:00"}, "as ISO 8601 with its zone"),
        ({"since": "1999-01-01T00:00:00Z"}, "from the year 2000 on"),
        ({"since": 7}, "since must be a timestamp"),
        ({"event_id": "1' or '1'='1", "handler": HANDLER}, "event_id must be a UUID"),
        ({"event_id": str(UUID(int=1))}, "named by its handler and its event"),
        ({"without_route": "yes", "handler": HANDLER}, "without_route must be true or false"),
    ],
)
def test_a_value_that_is_none_is_refused_in_words(database: Database, filter: Any, message: str) -> None:
    with database.session("operator") as operator, pytest.raises(errors.InvalidParameterValue, match=message):
        operator.execute("select dovecote.discard_deliveries('ada', 'why', %s)", (Jsonb(filter),))

    assert lines(database) == []


@pytest.mark.parametrize("key", ["handler", "fingerprint", "event_type", "aggregate_type", "aggregate_id"])
def test_sql_in_a_filter_is_text_that_nothing_matches(database: Database, key: str) -> None:
    before = state_of(database)
    with database.session("operator") as operator:
        for words in ("' or true --", "'); drop table dovecote.outbox; --", "%", "\\", "$1", "null", ""):
            call = "select affected from dovecote.discard_deliveries('ada', 'why', %s)"
            assert one(operator, call, (Jsonb({key: words}),)) == 0

    assert state_of(database) == before


@pytest.mark.parametrize(
    ("filter", "more", "message"),
    [
        ({"colour": "red"}, {}, "unknown key"),
        ({"event_types": []}, {}, "event_types must be a list"),
        ({"event_types": [1]}, {}, "event_types must be a list"),
        ({"event_types": "a"}, {}, "event_types must be a list"),
        ({"since": "2026-02-01T00:00:00Z", "until": "2026-01-01T00:00:00+00:00"}, {}, "ends .* before it begins"),
        ({"from_position": 2, "upto_position": 1}, {}, "ends .* before it begins"),
        ({"from_position": -1}, {}, "from_position must be a position"),
        ({"from_position": 1e300}, {}, "from_position must be a position"),
        ({"from_position": 1.5}, {}, "from_position must be a position"),
        ({"upto_position": "1"}, {}, "upto_position must be a position"),
        ({"aggregate_id": "7"}, {}, "needs its type too"),
        ({}, {"mode": "twice"}, "is backfill or reprocess"),
        ({}, {"mode": None}, "is backfill or reprocess"),
        ({}, {"handler": None}, "no handler without a name"),
        ({}, {"rate": 0}, "at least 1"),
        ({}, {"rate": -(2**31)}, "at least 1"),
        ({}, {"event_ids": []}, "1 to 100,000 event ids"),
        ({}, {"event_ids": [UUID(int=1)] * 100_001}, "1 to 100,000 event ids"),
    ],
)
def test_a_replay_that_makes_no_sense_is_refused_in_words(
    database: Database, filter: Any, more: Mapping[str, Any], message: str
) -> None:
    asked = {"handler": HANDLER, "mode": "backfill", "event_ids": None, "rate": None, **more}
    before = state_of(database)
    with database.session("operator") as operator, pytest.raises(errors.InvalidParameterValue, match=message):
        operator.execute(
            "select dovecote.start_replay('ada', 'why', %(handler)s, %(mode)s, %(filter)s, %(types)s,"
            " %(event_ids)s::uuid[], %(rate)s)",
            {**asked, "filter": Jsonb(filter), "types": [TYPE]},
        )

    assert state_of(database) == before


def test_a_batch_has_its_bounds(database: Database) -> None:
    with database.session("operator") as operator:
        for most in (None, 0, -1, 5_001, 2**31 - 1):
            with pytest.raises(errors.InvalidParameterValue, match="1 to 5000"):
                operator.execute("select dovecote.retry_deliveries('ada', 'why', '{}', now(), %s)", (most,))
        with pytest.raises(errors.InvalidParameterValue, match="before a given time"):
            operator.execute("select dovecote.retry_deliveries('ada', 'why', '{}', null)")

    assert lines(database) == []


def test_states_that_are_not_to_be_changed_are_refused(database: Database) -> None:
    before = state_of(database)
    with database.session("operator") as operator:
        for verb, state in (("retry", "waiting"), ("retry", "discarded"), ("discard", "waiting"), ("discard", "new")):
            with pytest.raises(errors.ObjectNotInPrerequisiteState, match=f"no {verb} of {state} deliveries"):
                operator.execute(
                    f"select dovecote.{verb}_deliveries('ada', 'why', %s)",
                    (Jsonb({"state": state}),),
                )
        waiting = one(operator, "select event_id::text from dovecote.deliveries where state = 'waiting'")
        single = Jsonb({"handler": HANDLER, "event_id": waiting})
        assert one(operator, "select affected from dovecote.retry_deliveries('ada', 'why', %s)", (single,)) == 0
        for verb, state in (("pause", "paused"), ("resume", "running")):
            with pytest.raises(errors.ObjectNotInPrerequisiteState, match="there is nothing to"):
                operator.execute(
                    f"select dovecote.{verb}_replay('ada', 'why',"
                    f" (select id from dovecote.replays where state = '{state}'))"
                )
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="there is no replay"):
            operator.execute("select dovecote.cancel_replay('ada', 'why', null)")
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="is not paused"):
            operator.execute("select dovecote.resume_handler('ada', 'why', null)")

    assert state_of(database) == before
