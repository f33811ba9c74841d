"""Lines that protect our functions from the sessions that call them, and writers from functions that are called."""

from tests.mutations.mutant import Mutant
from tests.mutations.sql_files import DELIVERIES_SQL, OUTBOX_SQL, PARTITIONS_SQL, RELAY_SQL, RETENTION_SQL, SEQUENCE_SQL

TESTS = "tests/security/test_functions.py"
SESSIONS = "tests/security/test_sessions.py"
BOUNDS = "tests/security/test_bounds.py"
ROLES = "tests/security/test_roles.py"


FUNCTIONS = (
    Mutant(
        "temporary objects come first in a function of the owner's",
        DELIVERIES_SQL,
        "language plpgsql stable security definer set search_path = pg_catalog, pg_temp as",
        "language plpgsql stable security definer set search_path = pg_catalog, dovecote as",
        TESTS,
    ),
    Mutant(
        "check_event means what the writer's path says",
        OUTBOX_SQL,
        "dovecote.check_event() returns trigger\nlanguage plpgsql set search_path = pg_catalog, pg_temp as",
        "dovecote.check_event() returns trigger\nlanguage plpgsql as",
        f"{TESTS} {SESSIONS}",
    ),
    Mutant(
        "a type is not escaped in the envelope",
        RELAY_SQL,
        "    || ',\"type\":' || to_json(event.event_type)::text\n",
        "    || ',\"type\":\"' || event.event_type || '\"'\n",
        SESSIONS,
    ),
    Mutant(
        "an envelope's moment is in the reader's zone",
        RELAY_SQL,
        "left(to_json(event.created_at at time zone interval '0')::text, -1) || '+00:00\"'",
        "to_json(event.created_at)::text",
        SESSIONS,
    ),
    Mutant(
        "a function is for everybody",
        RETENTION_SQL,
        "dovecote.lock_partition, dovecote.drop_partition to dovecote_worker, dovecote_operator;\n",
        "dovecote.lock_partition, dovecote.drop_partition to dovecote_worker, dovecote_operator, public;\n",
        TESTS,
    ),
    Mutant(
        "the next function is for everybody",
        OUTBOX_SQL,
        "alter default privileges revoke execute on functions from public;\n",
        "",
        TESTS,
    ),
    Mutant(
        "weeks are made in the caller's zone",
        PARTITIONS_SQL,
        "set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '500ms'"
        " as $$\n-- Make the partitions",
        "set search_path = pg_catalog, pg_temp set lock_timeout = '500ms' as $$\n-- Make the partitions",
        BOUNDS,
    ),
    Mutant(
        "any number of weeks is made",
        PARTITIONS_SQL,
        "weeks_ahead not between 0 and 60 then",
        "false then",
        BOUNDS,
    ),
    Mutant(
        "a young week is held",
        RETENTION_SQL,
        "    if dovecote.week_monday(week) + interval '8 days' > now() then\n",
        "    if false then\n",
        BOUNDS,
    ),
    Mutant(
        "a sequence that is well is locked",
        SEQUENCE_SQL,
        "    if dovecote.sequence_fault() is null and not exists",
        "    if false and not exists",
        BOUNDS,
    ),
    Mutant(
        "an archive is of any number of rows",
        RETENTION_SQL,
        "    elsif archive is not null and (archived_events is null or archived_processed is null) then\n",
        "    elsif false then\n",
        BOUNDS,
    ),
    Mutant(
        "a writer says when it wrote",
        OUTBOX_SQL,
        "grant insert (id, aggregate_type, aggregate_id, event_type, payload, headers)\n",
        "grant insert (id, aggregate_type, aggregate_id, event_type, payload, headers, created_at)\n",
        SESSIONS,
    ),
    Mutant(
        "a viewer changes retries",
        DELIVERIES_SQL,
        "grant select, delete on dovecote.deliveries to dovecote_worker;\n",
        "grant select, delete on dovecote.deliveries to dovecote_worker;\n"
        "grant update on dovecote.deliveries to dovecote_viewer;\n",
        ROLES,
    ),
    Mutant(
        "commands look into public",
        "dovecote/store/engines.py",
        'engine_for(settings, "dovecote cli", **ONLY_OUR_NAMES)',
        'engine_for(settings, "dovecote cli")',
        TESTS,
    ),
    Mutant(
        "migrations look into public",
        "dovecote/migrations/environment.py",
        'text("set search_path = pg_catalog, pg_temp")',
        'text("set search_path = public")',
        TESTS,
    ),
    Mutant(
        "consumers look for unnest() in public",
        "dovecote/processed_events.py",
        "pg_catalog.unnest(cast(:event_ids as uuid[]))",
        "unnest(cast(:event_ids as uuid[]))",
        TESTS,
    ),
    Mutant(
        "types without a route are kept without end",
        "dovecote/store/unrouted.py",
        "                connection.execute(_FORGET_OLDEST, (MAX_TYPES,))\n",
        "",
        ROLES,
    ),
)
