"""Who may do what to which table: all of it, in plain form. A right that is not here is refused; one here is given.

A new table, view or sequence gets a line, a new function that runs as its owner another. Partitions get no rights at
all: a login that could reach one directly would bypass what the parent checks.
"""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

pytestmark = pytest.mark.servers

ROLES = ("writer", "worker", "operator", "viewer", "service", "everybody")

# r read, a add (insert), w change (update), d remove (delete), u use (nextval). A star: some columns only, as COLUMNS
# below says. Nobody has truncate, references, trigger or maintain. The owner may do everything.
TABLES = """
    relation             writer  worker    operator  viewer  service  everybody

    outbox               a*      r,a*      r         r       a*       -
    outbox_events        -       r         r         r       -        -
    outbox_position      r,u     r,u       r         r       r,u      -

    processed_events     -       r,a,w*    r         r       -        -
    published_batches    -       r,a       r         r       -        -
    deliveries           -       r,a*,w*,d r         r       -        -
    subscriptions        -       r,a,w*    r         r       -        -
    progress             -       r,a,w     r         r       -        -
    postponed            -       r,a,w,d   r         r       -        -
    unrouted_types       -       r,a,w,d   r         r       -        -
    relay_state          -       r,w       r         r       -        -
    relay_heartbeat           -       r,w       r         r       -        -
    dropped_partitions        -       r         r         r       -        -

    replays              -       r,w*      r         r       -        -
    paused_handlers      -       r         r         r       -        -
    audit_log            -       r,a*      r         r       -        -

    message_keys         -       r         -         -       -        -
    relay_leader         -       w         -         -       -        -
    progress_lock        -       w         -         -       -        -
    retention_lock       -       -         -         -       -        -

    memberships          -       r,a,w     r         r       r,a,w    -
    billing_history      -       r,a       r         r       r,a      -
    billing_history_id_seq -     -         -         -       -        -
    price_quotes         -       r,a,w     r         r       r,a,w    -
    latest_prices        -       r,a,w     r         r       r,a,w    -
    challenges           -       r,a,w,d   r*        r*      r,a,w,d  -
    verified_phones      -       r,a,w,d   r         r       r,a,w,d  -
    verification_quotas  -       r,a,w,d   r         r       r,a,w,d  -
"""

EVENT = "id aggregate_type aggregate_id event_type payload headers"
CHALLENGE = "id user_id phone_hash phone_last4 expires_at tries_left created_at"
COLUMNS = {
    ("outbox", "writer", "a"): EVENT,
    ("outbox", "worker", "a"): EVENT,
    ("outbox", "service", "a"): EVENT,
    ("processed_events", "worker", "w"): "replay_id processed_at",
    (
        "deliveries",
        "worker",
        "a",
    ): "handler_name event_id position aggregate_type aggregate_id event_type state attempts"
    " next_attempt_at error_type headline error_fingerprint error trace_id replay_id",
    (
        "deliveries",
        "worker",
        "w",
    ): "state attempts next_attempt_at error_type headline error_fingerprint error trace_id replay_id"
    " leased_until first_leased_at updated_at",
    ("subscriptions", "worker", "w"): "routed_epoch replayable ordered",
    ("replays", "worker", "w"): "state done cursor_position updated_at finished_at problem",
    # And a trigger refuses all but the relay's own lines.
    ("audit_log", "worker", "a"): "actor action reason affected details",
    ("challenges", "operator", "r"): CHALLENGE,
    ("challenges", "viewer", "r"): CHALLENGE,
}

# Functions that run as the owner, and who may call them. The triggers among them are called by nobody.
AS_OWNER = """
    retry_deliveries     operator
    discard_deliveries   operator
    pause_handler        operator
    resume_handler       operator
    unsubscribe_handler  operator
    start_replay         operator
    pause_replay         operator
    resume_replay        operator
    cancel_replay        operator

    rotate_message_key   operator
    revoke_message_key   operator
    known_message_keys   operator viewer

    recover              operator worker
    ensure_partitions    operator worker
    place_misplaced_rows         operator worker
    copy_misplaced_rows          operator worker
    lock_partition            operator worker
    drop_partition            operator worker
    processed_lately     operator worker viewer

    recover_sequence     worker
    reopen_progress      worker

    begin_progress       -
    widen_progress       -
    make_partitions      -
    move_misplaced_rows          -
    refuse_dropped_partition  -
    skip_dropped_partition    -
"""

_LETTERS = {"r": "SELECT", "a": "INSERT", "w": "UPDATE", "d": "DELETE", "u": "USAGE"}
_NEVER = ("TRUNCATE", "REFERENCES", "TRIGGER")
_RELATIONS = """
    select c.oid::regclass::text as name, c.relname, c.relkind = 'S' as is_sequence, c.relispartition
    from pg_class c where c.relnamespace = 'dovecote'::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
"""
_HAS = "select has_{}_privilege(%s, %s, %s)"
_COLUMNS = """
    select coalesce(string_agg(a.attname, ' '), '') from pg_attribute a
    where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped
      and has_column_privilege(%s, a.attrelid, a.attnum, %s)
"""


@pytest.fixture(scope="module")
def owner(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def role_of(name: str) -> str:
    return "public" if name == "everybody" else f"dovecote_{name}"


def table(text: str) -> dict[str, dict[str, str]]:
    """Return what each role has, by relation."""
    header, *rows = [line.split() for line in text.splitlines() if line.strip()]
    return {name: dict(zip(header[1:], rights, strict=True)) for name, *rights in rows}


def one(connection: psycopg.Connection[Any], query: str, *parameters: object) -> Any:
    return (connection.execute(query, parameters).fetchone() or (None,))[0]


def granted(owner: psycopg.Connection[Any], relation: str, role: str, is_sequence: bool) -> tuple[str, dict[str, str]]:
    """Return the rights as TABLES writes them, and the columns of those that have a star."""
    found, columns = [], {}
    for letter, privilege in _LETTERS.items():
        if is_sequence:
            if privilege in ("SELECT", "UPDATE", "USAGE") and one(
                owner, _HAS.format("sequence"), role, relation, privilege
            ):
                found.append(letter)
        elif privilege != "USAGE" and one(owner, _HAS.format("table"), role, relation, privilege):
            found.append(letter)
        elif privilege not in ("DELETE", "USAGE") and (some := one(owner, _COLUMNS, relation, role, privilege)):
            found.append(f"{letter}*")
            columns[letter] = some
    return ",".join(found) or "-", columns


def test_each_role_has_the_rights_that_are_written_here_and_no_others(owner: psycopg.Connection[Any]) -> None:
    rights: dict[str, dict[str, str]] = {}
    columns: dict[tuple[str, str, str], set[str]] = {}
    for name, relname, is_sequence, is_partition in owner.execute(_RELATIONS).fetchall():
        for role in ROLES:
            have, some = granted(owner, name, role_of(role), is_sequence)
            if is_partition or relname == "dovecote_version":
                assert have in ("-", "r") if relname == "dovecote_version" else have == "-", (
                    f"{role} has {have} on {name}"
                )
                continue
            rights.setdefault(relname, {})[role] = have
            columns.update({(relname, role, letter): set(names.split()) for letter, names in some.items()})
            if not is_sequence:
                assert not any(one(owner, _HAS.format("table"), role_of(role), name, right) for right in _NEVER), name

    assert rights == table(TABLES)
    assert columns == {key: set(names.split()) for key, names in COLUMNS.items()}


def test_what_runs_as_the_owner_is_called_by_those_who_are_written_here(owner: psycopg.Connection[Any]) -> None:
    found = owner.execute(
        "select p.proname, p.oid::regprocedure::text from pg_proc p"
        " where p.pronamespace = 'dovecote'::regnamespace and p.prosecdef"
    ).fetchall()
    callers = {
        name: {role for role in ROLES if one(owner, _HAS.format("function"), role_of(role), signature, "execute")}
        for name, signature in found
    }

    wanted = {words[0]: set(words[1:]) - {"-"} for words in map(str.split, AS_OWNER.splitlines()) if words}
    assert callers == wanted


def test_nobody_but_the_owner_owns_or_passes_on(owner: psycopg.Connection[Any]) -> None:
    owners = owner.execute(
        "select distinct pg_get_userbyid(relowner) from pg_class where relnamespace = 'dovecote'::regnamespace"
        " and relname !~ '^dovecote_version'"
        " union select distinct pg_get_userbyid(proowner) from pg_proc where pronamespace = 'dovecote'::regnamespace"
    ).fetchall()
    passed_on = owner.execute(
        "select c.relname from pg_class c, aclexplode(c.relacl) g where c.relnamespace = 'dovecote'::regnamespace"
        " and g.is_grantable and g.grantee <> c.relowner"
    ).fetchall()
    may_create = [
        role for role in ROLES if one(owner, "select has_schema_privilege(%s, 'dovecote', 'create')", role_of(role))
    ]

    assert (owners, passed_on, may_create) == ([("dovecote_owner",)], [], [])
