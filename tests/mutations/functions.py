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
        f"{TESTS}::test_temporary_objects_are_found_by_no_function",
    ),
    Mutant(
        "check_event means what the writer's path says",
        FUNCTIONS_SQL,
        "alter function dovecote.check_event set search_path = pg_catalog, pg_temp;\n",
        "",
        f"{SESSIONS}::test_an_event_is_the_same_whatever_its_writer_s_session_says"
        "[set search_path = shop, pg_catalog, dovecote]",
    ),
    Mutant(
        "a type is not escaped in the envelope",
        FUNCTIONS_SQL,
        "    || ',\"type\":' || to_json(fact.event_type)::text\n",
        "    || ',\"type\":\"' || fact.event_type || '\"'\n",
        f"{SESSIONS}::test_an_envelope_escapes_each_field_whatever_let_the_row_in",
    ),
    Mutant(
        "an envelope's moment is in the reader's zone",
        FUNCTIONS_SQL,
        "left(to_json(fact.created_at at time zone interval '0')::text, -1) || '+00:00\"'",
        "to_json(fact.created_at)::text",
        f"{SESSIONS}::test_an_event_is_the_same_whatever_its_writer_s_session_says[set timezone = 'Asia/Kolkata']",
    ),
    Mutant(
        "a function is for everybody",
        FUNCTIONS_SQL,
        "revoke execute on all functions in schema dovecote from public;\n",
        "",
        f"{TESTS}::test_of_everything_in_our_schema",
    ),
    Mutant(
        "the next function is for everybody",
        FUNCTIONS_SQL,
        "alter default privileges revoke execute on functions from public;\n",
        "",
        f"{TESTS}::test_the_next_function_of_the_owner_is_not_for_everybody",
    ),
    Mutant(
        "weeks are made in the caller's zone",
        FUNCTIONS_SQL,
        "set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '500ms'"
        " as $$\n-- Make the partitions",
        "set search_path = pg_catalog, pg_temp set lock_timeout = '500ms' as $$\n-- Make the partitions",
        f"{BOUNDS}::test_weeks_begin_on_monday_in_utc_whoever_makes_them",
    ),
    Mutant(
        "any number of weeks is made",
        FUNCTIONS_SQL,
        "weeks_ahead not between 0 and 60 then",
        "false then",
        f"{BOUNDS}::test_an_argument_out_of_bounds_is_refused_in_words[ensure_partitions(400)]",
    ),
    Mutant(
        "a young week is held",
        FUNCTIONS_SQL,
        "    if dovecote.week_monday(week) + interval '8 days' > now() then\n",
        "    if false then\n",
        f"{BOUNDS}::test_nobody_stops_writers_by_leaving_a_call_open",
    ),
    Mutant(
        "a sequence that is well is locked",
        "migrations/sql/0029_operators_audit.up.sql",
        "    if fault is null and unread = 0 and (select",
        "    if false and (select",
        f"{BOUNDS}::test_nobody_stops_writers_by_leaving_a_call_open[recover('me', 'x')-operator]",
    ),
    Mutant(
        "an archive is of any number of rows",
        FUNCTIONS_SQL,
        "    elsif archive is not null and (archived_events is null or archived_processed is null) then\n",
        "    elsif false then\n",
        f"{BOUNDS}::test_an_argument_out_of_bounds_is_refused_in_words",
    ),
    Mutant(
        "a writer says when it wrote",
        RIGHTS_SQL,
        "revoke insert (created_at) on dovecote.outbox from dovecote_writer, dovecote_worker;\n",
        "",
        f"{SESSIONS}::test_moment_and_position_are_the_server_s[created_at-1970-01-01-insert-writer]",
    ),
    Mutant(
        "a viewer changes retries",
        RIGHTS_SQL,
        "grant select on sequence dovecote.outbox_position, dovecote.relay_beat to dovecote_viewer;\n",
        "grant select on sequence dovecote.outbox_position, dovecote.relay_beat to dovecote_viewer;\n"
        "grant update on dovecote.deliveries to dovecote_viewer;\n",
        f"{ROLES}::test_a_viewer_s_rights_are_to_select_and_to_call_what_only_looks",
    ),
    Mutant(
        "commands look into public",
        "dovecote/store/engines.py",
        'engine_for(settings, "dovecote cli", **ONLY_OUR_NAMES)',
        'engine_for(settings, "dovecote cli")',
        f"{TESTS}::test_sessions_of_relay_and_commands_have_no_schema_of_others_on_their_path",
    ),
    Mutant(
        "migrations look into public",
        "migrations/env.py",
        'text("set search_path = pg_catalog, pg_temp")',
        'text("set search_path = public")',
        f"{TESTS}::test_a_migration_binds_nothing_of_public",
    ),
    Mutant(
        "consumers look for unnest() in public",
        "dovecote/processed_events.py",
        "pg_catalog.unnest(cast(:event_ids as uuid[]))",
        "unnest(cast(:event_ids as uuid[]))",
        f"{TESTS}::test_a_command_of_a_superuser_runs_nobody_s_code[command0]",
    ),
    Mutant(
        "types without a route are kept without end",
        "dovecote/store/unrouted.py",
        "                connection.execute(_FORGET_OLDEST, (MAX_TYPES,))\n",
        "",
        f"{ROLES}::test_a_writer_of_types_without_end_fills_no_table",
    ),
)
