"""Lines that protect our functions from the sessions that call them, and writers from functions that are called."""

from tests.mutations.mutant import Mutant

TESTS = "tests/security/test_functions.py"
SESSIONS = "tests/security/test_sessions.py"
BOUNDS = "tests/security/test_bounds.py"
ROLES = "tests/security/test_roles.py"

FUNCTIONS_SQL = "migrations/sql/0027_functions.up.sql"
RIGHTS_SQL = "migrations/sql/0028_rights.up.sql"

FUNCTIONS = (
    Mutant(
        "temporary objects come first in a function of the owner's",
        FUNCTIONS_SQL,
        "language plpgsql stable security definer set search_path = pg_catalog, pg_temp as",
        "language plpgsql stable security definer set search_path = pg_catalog, dovecote as",
        TESTS,
    ),
    Mutant(
        "check_event means what the writer's path says",
        FUNCTIONS_SQL,
        "alter function dovecote.check_event set search_path = pg_catalog, pg_temp;\n",
        "",
        f"{TESTS} {SESSIONS}",
    ),
    Mutant(
        "a type is not escaped in the envelope",
        FUNCTIONS_SQL,
        "    || ',\"type\":' || to_json(fact.event_type)::text\n",
        "    || ',\"type\":\"' || fact.event_type || '\"'\n",
        SESSIONS,
    ),
    Mutant(
        "an envelope's moment is in the reader's zone",
        FUNCTIONS_SQL,
        "left(to_json(fact.created_at at time zone interval '0')::text, -1) || '+00:00\"'",
        "to_json(fact.created_at)::text",
        SESSIONS,
    ),
    Mutant(
        "a function is for everybody",
        FUNCTIONS_SQL,
        "revoke execute on all functions in schema dovecote from public;\n",
        "",
        TESTS,
    ),
    Mutant(
        "the next function is for everybody",
        FUNCTIONS_SQL,
        "alter default privileges revoke execute on functions from public;\n",
        "",
        TESTS,
    ),
    Mutant(
        "weeks are made in the caller's zone",
        FUNCTIONS_SQL,
        "set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '500ms'"
        " as $$\n-- Make the partitions",
        "set search_path = pg_catalog, pg_temp set lock_timeout = '500ms' as $$\n-- Make the partitions",
        BOUNDS,
    ),
    Mutant(
        "any number of weeks is made",
        FUNCTIONS_SQL,
        "weeks_ahead not between 0 and 60 then",
        "false then",
        BOUNDS,
    ),
    Mutant(
        "a young week is held",
        FUNCTIONS_SQL,
        "    if dovecote.week_monday(week) + interval '8 days' > now() then\n",
        "    if false then\n",
        BOUNDS,
    ),
    Mutant(
        "a sequence that is well is locked",
        FUNCTIONS_SQL,
        "    if dovecote.sequence_fault() is null and not exists",
        "    if false and not exists",
        BOUNDS,
    ),
    Mutant(
        "an archive is of any number of rows",
        FUNCTIONS_SQL,
        "    elsif archive is not null and (archived_events is null or archived_processed is null) then\n",
        "    elsif false then\n",
        BOUNDS,
    ),
    Mutant(
        "a writer says when it wrote",
        RIGHTS_SQL,
        "revoke insert (created_at) on dovecote.outbox from dovecote_writer, dovecote_worker;\n",
        "",
        SESSIONS,
    ),
    Mutant(
        "a viewer changes retries",
        RIGHTS_SQL,
        "grant select on sequence dovecote.outbox_position, dovecote.relay_beat to dovecote_viewer;\n",
        "grant select on sequence dovecote.outbox_position, dovecote.relay_beat to dovecote_viewer;\n"
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
        "migrations/env.py",
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
