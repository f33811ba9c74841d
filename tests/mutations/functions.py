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
        "dovecote/migrations/sql/0004_deliveries.up.sql",
        "language plpgsql stable security definer set search_path = pg_catalog, pg_temp as",
        "language plpgsql stable security definer set search_path = pg_catalog, dovecote as",
        f"{TESTS}::test_temporary_objects_are_found_by_no_function",
    ),
    Mutant(
        "check_event means what the writer's path says",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "dovecote.check_event() returns trigger\nlanguage plpgsql set search_path = pg_catalog, pg_temp as",
        "dovecote.check_event() returns trigger\nlanguage plpgsql as",
        f"{SESSIONS}::test_an_event_is_the_same_whatever_its_writer_s_session_says"
        "[set search_path = shop, pg_catalog, dovecote]",
    ),
    Mutant(
        "a type is not escaped in the envelope",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "    || ',\"type\":' || to_json(event.event_type)::text\n",
        "    || ',\"type\":\"' || event.event_type || '\"'\n",
        f"{SESSIONS}::test_an_envelope_escapes_each_field_whatever_let_the_row_in",
    ),
    Mutant(
        "an envelope's time is in the reader's zone",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "left(to_json(event.created_at at time zone interval '0')::text, -1) || '+00:00\"'",
        "to_json(event.created_at)::text",
        f"{SESSIONS}::test_an_event_is_the_same_whatever_its_writer_s_session_says[set timezone = 'Asia/Kolkata']",
    ),
    Mutant(
        "a function is for everybody",
        "dovecote/migrations/sql/0010_retention.up.sql",
        "dovecote.lock_partition, dovecote.drop_partition to dovecote_worker, dovecote_operator;\n",
        "dovecote.lock_partition, dovecote.drop_partition to dovecote_worker, dovecote_operator, public;\n",
        f"{TESTS}::test_of_everything_in_our_schema",
    ),
    Mutant(
        "the next function is for everybody",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "alter default privileges revoke execute on functions from public;\n",
        "",
        f"{TESTS}::test_the_next_function_of_the_owner_is_not_for_everybody",
    ),
    Mutant(
        "weeks are made in the caller's zone",
        "dovecote/migrations/sql/0009_partitions.up.sql",
        "set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set"
        " lock_timeout = '500ms' as $$\n"
        "-- Make the partitions",
        "set search_path = pg_catalog, pg_temp set lock_timeout = '500ms' as $$\n-- Make the partitions",
        f"{BOUNDS}::test_weeks_begin_on_monday_in_utc_in_any_session",
    ),
    Mutant(
        "any number of weeks is made",
        "dovecote/migrations/sql/0009_partitions.up.sql",
        "weeks_ahead not between 0 and 60 then",
        "false then",
        f"{BOUNDS}::test_an_argument_out_of_bounds_is_refused_in_words[ensure_partitions(400)]",
    ),
    Mutant(
        "a young week is held",
        "dovecote/migrations/sql/0010_retention.up.sql",
        "    if dovecote.week_monday(week) + interval '8 days' > now() then\n",
        "    if false then\n",
        f"{BOUNDS}::test_nobody_stops_writers_by_leaving_a_call_open",
    ),
    Mutant(
        "a sequence that is well is locked",
        "dovecote/migrations/sql/0011_sequence.up.sql",
        "    if dovecote.sequence_fault() is null and not exists",
        "    if false and not exists",
        f"{BOUNDS}::test_nobody_stops_writers_by_leaving_a_call_open[recover('me', 'x')-operator]",
    ),
    Mutant(
        "an archive is of any number of rows",
        "dovecote/migrations/sql/0010_retention.up.sql",
        "    elsif archive is not null and (archived_events is null or archived_processed is null) then\n",
        "    elsif false then\n",
        f"{BOUNDS}::test_an_argument_out_of_bounds_is_refused_in_words",
    ),
    Mutant(
        "a writer says when it wrote",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "grant insert (id, aggregate_type, aggregate_id, event_type, payload, headers)\n",
        "grant insert (id, aggregate_type, aggregate_id, event_type, payload, headers, created_at)\n",
        f"{SESSIONS}::test_time_and_position_are_the_server_s[created_at-1970-01-01-insert-writer]",
    ),
    Mutant(
        "a viewer changes retries",
        "dovecote/migrations/sql/0004_deliveries.up.sql",
        "grant select, delete on dovecote.deliveries to dovecote_worker;\n",
        "grant select, delete on dovecote.deliveries to dovecote_worker;\n"
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
        "dovecote/migrations/environment.py",
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
