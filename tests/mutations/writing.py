"""Mutants of what writers do and commit."""

from tests.mutations.mutant import Mutant

READING = "tests/dovecote/relay/test_reading_forward.py"
RELAY = "tests/dovecote/relay/test_relay.py"
WRITING = "tests/dovecote/test_unit_of_work.py"
HOOKS = "tests/dovecote/unit_of_work/test_hooks.py"
OUTER = "tests/dovecote/unit_of_work/test_outer_connections.py"
REFUSALS = "tests/dovecote/unit_of_work/test_refusals.py"
TRACES = "tests/dovecote/test_trace_headers.py"
EMITTING = "dovecote/unit_of_work/emitting.py"
OUTBOX_SQL = "migrations/sql/0002_outbox.up.sql"
LOCKS_SQL = "migrations/sql/0032_leader_lock.up.sql"

MUTANTS_OF_WRITING = (
    # Writing ------------------------------------------------------------------------------------
    Mutant(
        "no low-water mark is announced",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "    if not pg_try_advisory_xact_lock_shared(dovecote.writer_key(announced)) then",
        "    if false then",
        f"{READING}::test_a_savepoint_given_up_later_leaves_the_first_low_water_mark_in_place",
    ),
    Mutant(
        "the low-water mark is announced after the position",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "create trigger announce before insert",
        "create trigger announce after insert",
        f"{READING}::test_a_rollback_to_a_savepoint_does_not_hide_what_is_written_after_it",
    ),
    Mutant(
        "the low-water mark is that of the highest position, not of one's own",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "then coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0) end;",
        "then coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0) + 1 end;",
        f"{READING}::test_a_savepoint_given_up_later_leaves_the_first_low_water_mark_in_place",
    ),
    Mutant(
        "a transaction announces itself once in a session's life",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "           and pg_try_advisory_xact_lock_shared(dovecote.writer_key(announced)) then\n",
        "           then\n",
        "tests/security/test_locks.py::test_a_writer_that_says_it_has_announced_announces",
    ),
    Mutant(
        "the sequence hands out blocks of positions",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "create sequence dovecote.outbox_position as bigint cache 1;",
        "create sequence dovecote.outbox_position as bigint cache 20;",
        f"{READING}::test_a_new_reader_hands_out_only_what_was_not_recorded",
    ),
    Mutant(
        "nobody wakes the relay",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "perform pg_notify('dovecote_outbox', '');",
        "null;",
        f"{RELAY}::test_append_event_wakes_the_relay_too",
    ),
    Mutant(
        "events get their positions before the aggregate's row is locked",
        EMITTING,
        "                session.flush()\n                self.write(",
        "                self.write(",
        f"{WRITING}::test_an_event_is_written_after_the_state_it_describes",
    ),
    Mutant(
        "a savepoint rolled back keeps the events emitted inside it",
        EMITTING,
        "[one for one in self._waiting if not _within(one.emitted_in, transaction)]",
        "list(self._waiting)",
        f"{WRITING}::test_a_rolled_back_savepoint_drops_what_was_emitted_inside",
    ),
    Mutant(
        "events outlive the transaction they were emitted in",
        EMITTING,
        "        left = self.drop()\n",
        "        left: list[_Waiting] = []\n",
        f"{WRITING}::test_a_session_closed_without_commit_leaks_nothing_into_its_next_transaction",
    ),
    Mutant(
        "what is emitted while the transaction commits is not written at its end",
        EMITTING,
        "        if self._committing or isinstance(session.bind, Connection):\n",
        "        if isinstance(session.bind, Connection):\n",
        f"{HOOKS}::test_an_event_of_a_hook_is_written_with_the_transaction",
    ),
    Mutant(
        "a session on somebody else's connection writes only when it commits itself",
        EMITTING,
        "        if self._committing or isinstance(session.bind, Connection):\n",
        "        if self._committing:\n",
        f"{OUTER}::test_an_async_session_on_an_outer_connection_keeps_its_event",
    ),
    Mutant(
        "a savepoint left open at the commit hides what waits",
        EMITTING,
        "            if session.in_nested_transaction():\n                # The commit",
        "            if False:\n                # The commit",
        f"{HOOKS}::test_savepoints_inside_of_a_hook_of_the_commit_keep_their_meaning",
    ),
    Mutant(
        "a transaction is committed without an event, in silence",
        EMITTING,
        "        if left and is_committed:\n",
        "        if False:\n",
        f"{REFUSALS}::test_a_commit_that_leaves_an_event_unwritten_raises",
    ),
    Mutant(
        "a session is closed with its events, in silence",
        EMITTING,
        "        if left and not was_rolled_back:\n",
        "        if False:\n",
        f"{REFUSALS}::test_a_session_closed_without_a_commit_says_what_it_drops",
    ),
    Mutant(
        "an event is taken after the commit",
        EMITTING,
        "        self._committing, self._rolled_back, self._is_over = 0, False, is_committed\n",
        "        self._committing, self._rolled_back, self._is_over = 0, False, False\n",
        f"{REFUSALS}::test_an_event_after_a_commit_or_rollback_inside_of_the_block_is_refused",
    ),
    Mutant(
        "an event is taken in a transaction that has ended",
        EMITTING,
        "        elif not session.is_active:\n",
        "        elif False:\n",
        f"{REFUSALS}::test_an_event_of_a_hook_after_the_end_is_refused",
    ),
    Mutant(
        "a connection with a late event that was refused goes back to the pool in its transaction",
        EMITTING,
        "            connection.dialect.do_rollback(connection.connection)\n",
        "",
        f"{HOOKS}::test_a_late_event_that_the_database_refuses_leaves_nothing_behind_not_even_in_the_pool",
    ),
    Mutant(
        "what somebody else's savepoint has rolled back is written at the commit",
        EMITTING,
        "        if not self._session.in_nested_transaction():\n            self._drop()\n",
        "        if False:\n            self._drop()\n",
        f"{OUTER}::test_what_the_session_rolled_back_does_not_come_with_the_outer_commit",
    ),
    Mutant(
        "a session begins with a savepoint that its events are written before",
        EMITTING,
        "        if not session.in_nested_transaction() and (session.is_active or _why_inactive(session)):\n",
        "        if not session.in_nested_transaction():\n",
        f"{OUTER}::test_what_the_session_rolled_back_does_not_come_with_the_outer_commit",
    ),
    Mutant(
        "an event stays behind when a session is closed on a connection that goes on",
        EMITTING,
        "        if self._connection in transaction.connections and self._connection.in_transaction():\n",
        "        if False:\n",
        f"{OUTER}::test_a_session_closed_without_a_commit_leaves_its_event_where_it_leaves_its_state",
    ),
    Mutant(
        "a block that caught a database error ends as if it had committed",
        "dovecote/unit_of_work/__init__.py",
        "                yield uow\n                refuse_aborted(session)\n",
        "                yield uow\n",
        f"{REFUSALS}::test_a_block_that_caught_a_database_error_does_not_end_as_if_it_had_committed",
    ),
    Mutant(
        "a unit of work takes events after its block",
        "dovecote/unit_of_work/__init__.py",
        "        if self._block_has_ended:\n",
        "        if False:\n",
        f"{REFUSALS}::test_an_event_after_the_block_of_its_unit_of_work_is_refused",
    ),
    Mutant(
        "a trace of any form is stored",
        "dovecote/unit_of_work/trace_headers.py",
        "isinstance(traceparent, str) and _TRACEPARENT.fullmatch(traceparent)",
        "traceparent",
        f"{TRACES}::test_only_a_trace_that_is_one_is_kept",
    ),
    Mutant(
        "a propagator fails an emit",
        "dovecote/unit_of_work/trace_headers.py",
        "    except Exception:\n        _warn_once()\n",
        "    except ImportError:\n        _warn_once()\n",
        f"{TRACES}::test_a_propagator_that_fails_is_reported_once",
    ),
    Mutant(
        "the headers of a trace count against the service's own",
        "dovecote/outbox.py",
        '_json(event, "headers", dict(headers), MAX_HEADER_BYTES)\n    return',
        '_json(event, "headers", {**trace, **headers}, MAX_HEADER_BYTES)\n    return',
        f"{TRACES}::test_the_longest_trace_state_fits_beside_the_longest_headers",
    ),
    Mutant(
        "a writer may go round the trigger into a partition",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "    on dovecote.outbox to dovecote_writer, dovecote_service, dovecote_worker;\n",
        "    on dovecote.outbox, dovecote.outbox_default to dovecote_writer, dovecote_service, dovecote_worker;\n",
        f"{WRITING}::test_nobody_gets_into_a_partition_by_the_back_door",
    ),
)
