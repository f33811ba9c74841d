"""Mutants of how the relay reads the outbox, and of the sizes it bears."""

from tests.mutations.mutant import Mutant

READING = "tests/dovecote/relay/test_reading_forward.py"
GAPS = "tests/dovecote/relay/test_gaps.py"
SIZES = "tests/dovecote/relay/test_sizes.py"
UNREADABLE = "tests/dovecote/relay/test_unreadable_rows.py"
ENVELOPE = "tests/dovecote/envelope/test_envelope.py"
SIZES_SQL = "migrations/sql/0017_sizes.up.sql"
LOCKS_SQL = "migrations/sql/0032_leader_lock.up.sql"
FUNCTIONS_SQL = "migrations/sql/0027_functions.up.sql"

MUTANTS_OF_READING = (
    # Reading ------------------------------------------------------------------------------------
    Mutant(
        "low-water marks are not asked for",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "safe_position := least(last_position, lowest);",
        "safe_position := last_position;",
        f"{READING}::test_a_savepoint_given_up_later_leaves_the_first_low_water_mark_in_place",
    ),
    Mutant(
        "the checkpoint goes to the high-water mark",
        "dovecote/store/reader.py",
        "self.checkpoint = max(self.checkpoint, min(safe, high_water_mark))",
        "self.checkpoint = max(self.checkpoint, high_water_mark)",
        f"{READING}::test_a_stuck_writer_delays_nobody_and_holds_the_checkpoint",
    ),
    Mutant(
        "a gap below the safe position is kept for ever",
        "dovecote/store/reader.py",
        "above([*still_missing, *new], safe)",
        "[*still_missing, *new]",
        f"{READING}::test_the_gap_of_a_writer_that_rolled_back_is_forgotten",
    ),
    Mutant(
        "gaps are not looked into",
        "dovecote/store/reader.py",
        "        if not self._gaps:\n            return Read([])",
        "        if True:\n            return Read([])",
        f"{READING}::test_a_savepoint_given_up_later_leaves_the_first_low_water_mark_in_place",
    ),
    Mutant(
        "a new reader forgets the gaps above the checkpoint",
        "dovecote/store/reader.py",
        "                self._gaps += missing(self.high_water_mark, upto, known)\n",
        "",
        f"{READING}::test_a_new_reader_hands_out_only_what_was_not_recorded",
    ),
    Mutant(
        "late rows are asked for before those beyond",
        "dovecote/store/reader.py",
        "        beyond = self.envelopes.read(_BEYOND, self.high_water_mark, self._batch_size)\n",
        "        early = self._late()\n"
        "        beyond = self.envelopes.read(_BEYOND, self.high_water_mark, self._batch_size)\n"
        "        self._late = lambda: early  # type: ignore[method-assign]\n",
        f"{READING}::test_more_late_rows_than_a_batch_takes_come_before_newer_ones",
    ),
    Mutant(
        "a batch cut short leaves out what it did not take",
        "dovecote/store/reader.py",
        "        if beyond.is_cut:  # what was left out is above the next mark\n",
        "        if False:\n",
        f"{SIZES}::test_a_batch_is_cut_where_its_bytes_end_and_the_next_goes_on_there",
    ),
    Mutant(
        "gaps are looked into in every read",
        "dovecote/store/reader.py",
        "        return low if ended is None else ended\n",
        "        return 0\n",
        f"{GAPS}::test_gaps_are_looked_into_no_more_while_nobody_ends_who_could_fill_them",
    ),
    Mutant(
        "a gap above the sequence is not looked into for its own sake",
        "dovecote/store/reader.py",
        "        self._unseen_above = last_position\n",
        "        self._unseen_above = high_water_mark\n",
        f"{GAPS}::test_of_a_writer_that_ends_while_gaps_are_looked_into_nothing_is_taken_before_its_first_event",
    ),
    Mutant(
        "who is over is not asked again when late rows were found",
        "dovecote/store/reader.py",
        "if not late.rows or (ended := self._lowest_mark_of_ended(low)) >= low:",
        "if True:",
        f"{GAPS}::test_of_a_writer_that_ends_while_gaps_are_looked_into_nothing_is_taken_before_its_first_event",
    ),
    Mutant(
        "the rest of a full batch of late rows is left",
        "dovecote/store/reader.py",
        "        self._unseen_above = 0  # the rest is visible already, whichever writer ends next\n",
        "",
        f"{GAPS}::test_rows_beyond_a_large_import_wait_only_for_what_is_of_their_aggregate",
    ),
    Mutant(
        "rows beyond go along with late ones whatever they follow on",
        "dovecote/store/reader.py",
        "        rows = [row for row in beyond.rows if row[0] not in behind]\n",
        "        rows = beyond.rows\n",
        f"{GAPS}::test_rows_beyond_a_large_import_wait_only_for_what_is_of_their_aggregate",
    ),
    Mutant(
        "rows beyond wait until all late ones are read",
        "dovecote/store/reader.py",
        "            return self._late_first(late, beyond)\n",
        "            return self._late_first(late, Read([]))\n",
        f"{GAPS}::test_rows_beyond_a_large_import_wait_only_for_what_is_of_their_aggregate",
    ),
    Mutant(
        "a writer that ended between two looks is forgotten",
        "dovecote/store/gaps.py",
        "known = self._before | self._now",
        "known = self._now",
        f"{READING}::test_a_stuck_writer_delays_nobody_and_holds_the_checkpoint",
    ),
    # Sizes --------------------------------------------------------------------------------------
    Mutant(
        "what comes compressed is taken for small",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "       and pg_catalog.pg_column_compression(new.payload) is null\n",
        "",
        f"{SIZES}::test_a_payload_that_is_too_large_as_text_is_refused_in_words"
        "[more than Postgres can make a text of-compressed, from another table]",
    ),
    Mutant(
        "the size of a payload is what the column has",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "pg_catalog.pg_column_size(pg_catalog.jsonb_out(new.payload)) <= 262145",
        "pg_catalog.pg_column_size(new.payload) <= 262145",
        f"{SIZES}::test_a_payload_that_is_too_large_as_text_is_refused_in_words[a few large numbers-as it is sent]",
    ),
    Mutant(
        "the size of headers is what the column has",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "pg_catalog.pg_column_size(pg_catalog.jsonb_out(new.headers)) <= 16385",
        "pg_catalog.pg_column_size(new.headers) <= 16385",
        f"{SIZES}::test_headers_that_are_too_large_as_text_are_refused_in_words",
    ),
    Mutant(
        "numbers are not added up before they are made a text",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "    if stored > 8000 then\n",
        "    if false then\n",
        f"{SIZES}::test_a_payload_that_is_too_large_as_text_is_refused_in_words[half a gigabyte as text-as it is sent]",
    ),
    Mutant(
        "an envelope that cannot be made ends the statement",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "            when others then\n",
        "            when division_by_zero then\n",
        f"{UNREADABLE}::test_a_row_that_cannot_be_read_is_dead_alone_and_says_why"
        "[a small value that was damaged on disk]",
    ),
    Mutant(
        "an envelope may be of any size",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "                    if octet_length(envelope) > max_bytes_of_one then\n",
        "                    if false then\n",
        f"{UNREADABLE}::test_a_row_that_cannot_be_read_is_dead_alone_and_says_why[a small row of large numbers]",
    ),
    Mutant(
        "a type with a quote is taken for a word",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "quote_ident(event.aggregate_type || '_') = event.aggregate_type || '_'",
        "true",
        f"{UNREADABLE}::test_a_row_that_cannot_be_read_is_dead_alone_and_says_why[a type that is no word]",
    ),
    Mutant(
        "a small row that cannot be read ends the relay",
        "dovecote/store/envelopes.py",
        "        if connection.closed:\n            raise\n",
        "        raise\n",
        f"{UNREADABLE}::test_a_row_that_cannot_be_read_is_dead_alone_and_says_why"
        "[a small value that was damaged on disk]",
    ),
    Mutant(
        "a batch is not cut where its bytes end",
        "dovecote/store/envelopes.py",
        "(kept and size > self.max_bytes)",
        "False",
        f"{SIZES}::test_a_batch_is_cut_where_its_bytes_end_and_the_next_goes_on_there",
    ),
    Mutant(
        "what was cut off a batch is passed over",
        "dovecote/store/envelopes.py",
        "                return Read(kept, True, problems)\n",
        "                return Read(kept, False, problems)\n",
        f"{SIZES}::test_a_batch_is_cut_where_its_bytes_end_and_the_next_goes_on_there",
    ),
    Mutant(
        "late rows and those beyond have a batch's bytes each",
        "dovecote/store/reader.py",
        "        if late.rows:\n            beyond = beyond.within(",
        "        if False:\n            beyond = beyond.within(",
        f"{SIZES}::test_late_rows_that_fill_a_batch_go_first_and_hold_the_checkpoint",
    ),
    Mutant(
        "a publish is one call however large it is",
        "dovecote/broker/publisher.py",
        "            if size and size + len(bundle.message) > self._publish_bytes:\n",
        "            if False:\n",
        f"{SIZES}::test_a_publish_takes_several_calls_when_it_is_large",
    ),
    Mutant(
        "what cannot be read is passed and written nowhere",
        "dovecote/relay/leader.py",
        "            self._record_unreadable(batch)\n",
        "",
        f"{UNREADABLE}::test_a_row_that_cannot_be_read_is_dead_alone_and_says_why[a text of more than a gigabyte]",
    ),
    Mutant(
        "a retry that cannot be read is sent again and again",
        "dovecote/store/unsendable.py",
        "        where known.state = 'retrying'\n",
        "        where false\n",
        f"{UNREADABLE}::test_a_retry_of_it_is_dead_again_and_holds_up_no_other_retry",
    ),
    Mutant(
        "what cannot be read is in messages all the same",
        "dovecote/relay/bundler.py",
        "self._by_type.get(event_type, ()) if size else ():",
        "self._by_type.get(event_type, ()):",
        f"{ENVELOPE}::test_a_row_of_which_no_envelope_can_be_made_is_in_no_message",
    ),
    Mutant(
        "an event that stands still is no finding",
        "dovecote/operations/doctor/progress.py",
        "    if row is not None and row.seconds > _LONG_SECONDS:\n",
        "    if False:\n",
        "tests/dovecote/operations/test_progress.py::test_an_old_event_that_is_not_published_is_named",
    ),
    Mutant(
        "the locks say who is over",
        "dovecote/store/gaps.py",
        "where pg_visible_in_snapshot(xid::text::xid8, pg_current_snapshot())",
        "where not exists (select from pg_locks where transactionid::text::bigint = writer.xid)"
        " and not exists (select from pg_locks where locktype = 'advisory' and classid::bigint >> 16 = 17602)",
        f"{GAPS}::test_only_what_lies_above_the_low_water_mark_of_the_writer_that_ended_is_looked_into",
    ),
    Mutant(
        "the highest number of a transaction is taken for it",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "min(now_xid + (((l.transactionid",
        "max(now_xid + (((l.transactionid",
        f"{GAPS}::test_a_savepoint_that_is_open_does_not_make_its_transaction_seem_over",
    ),
)
