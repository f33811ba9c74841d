"""Mutants of how a consumer acts once on a bundle."""

from tests.mutations.mutant import Mutant

RELAY = "tests/dovecote/relay/test_relay.py"
CONSUME = "tests/dovecote/consumer/test_consumer.py"
MARKS = "tests/dovecote/consumer/test_marks.py"
RELEASING = "tests/dovecote/store/test_releasing.py"
RELEASING_SQL = "migrations/sql/0021_releasing.up.sql"
LEFTOVERS_SQL = "migrations/sql/0026_leftovers.up.sql"

CONSUMING = (
    # Consuming ----------------------------------------------------------------------------------
    Mutant(
        "a handler acts before it is recorded",
        "dovecote/consumer/transaction.py",
        "            fresh = self._uow.once(route.handler, free)\n",
        "            fresh = list(free)\n",
        f"{CONSUME}::test_an_event_waits_for_the_one_before_it_in_another_worker_s_hands",
    ),
    Mutant(
        "a mark that is there is an error",
        "dovecote/processed_events.py",
        "    on conflict do nothing\n",
        "",
        f"{MARKS}::test_a_message_that_comes_twice_is_acted_on_once_and_fails_for_nobody",
    ),
    Mutant(
        "bundles that overlap mark in any order",
        "dovecote/processed_events.py",
        "from bundle order by event_id\n",
        "from bundle order by md5(random()::text)\n",
        f"{MARKS}::test_bundles_that_overlap_wait_for_each_other_before_they_mark_anything_else",
    ),
    # An event of any order takes one statement for both.
    Mutant(
        "a mark that is there is an error to a bundle in any order",
        "dovecote/store/deliveries.py",
        "        on conflict do nothing\n",
        "",
        f"{MARKS}::test_a_message_that_comes_twice_is_acted_on_once_and_fails_for_nobody",
    ),
    Mutant(
        "bundles in any order that overlap mark in any order",
        "dovecote/store/deliveries.py",
        "        order by event_id\n        on conflict",
        "        order by md5(random()::text)\n        on conflict",
        f"{MARKS}::test_bundles_that_overlap_wait_for_each_other_before_they_mark_anything_else",
    ),
    Mutant(
        "a redelivered bundle in any order takes up what failed",
        "dovecote/store/deliveries.py",
        "        where not exists (select from dovecote.deliveries d\n",
        "        where true or not exists (select from dovecote.deliveries d\n",
        f"{MARKS}::test_what_failed_keeps_its_schedule_when_its_bundle_comes_again",
    ),
    Mutant(
        "a bundle that failed is given up as a whole",
        "dovecote/consumer/consumer.py",
        "            elif len(envelopes) > 1:\n",
        "            elif False:\n",
        f"{CONSUME}::test_later_events_of_an_aggregate_wait_for_the_one_that_failed",
    ),
    Mutant(
        "a failure that cannot be recorded is acknowledged",
        "dovecote/consumer/consumer.py",
        "        failed, absent = self._retry(write)\n",
        "        try:\n            failed, absent = write()\n"
        "        except Exception:\n            failed, absent = [], []\n",
        f"{CONSUME}::test_losing_postgres_while_a_failure_is_recorded_counts_it_once",
    ),
    Mutant(
        "an outage spends an attempt",
        "dovecote/consumer/retrying.py",
        "        if is_transient(error):\n            self._outages",
        "        if False:\n            self._outages",
        f"{CONSUME}::test_losing_postgres_spends_no_attempt_and_doubles_nothing",
    ),
    Mutant(
        "a redelivered bundle takes up what failed, before its time",
        "dovecote/store/deliveries.py",
        "        where event_id not in (select d.event_id from dovecote.deliveries d\n",
        "        where true or event_id not in (select d.event_id from dovecote.deliveries d\n",
        f"{MARKS}::test_what_failed_keeps_its_schedule_when_its_bundle_comes_again",
    ),
    Mutant(
        "a retry takes up what is no longer due",
        "dovecote/store/deliveries.py",
        "select event_id from due where event_id not in (select event_id from absent)",
        "select event_id from bundle where event_id not in (select event_id from absent)",
        f"{CONSUME}::test_a_retry_that_arrives_after_the_event_was_buried_is_not_acted_on",
    ),
    Mutant(
        "what is being tried again can be discarded",
        "dovecote/store/deliveries.py",
        "where handler_name = %(handler_name)s)\n        for update\n",
        "where handler_name = %(handler_name)s)\n",
        f"{MARKS}::test_what_is_being_tried_again_cannot_be_discarded_until_that_ends",
    ),
    Mutant(
        "what was discarded fails back to life",
        "dovecote/store/deliveries.py",
        "        where known.state <> 'discarded'\n",
        "",
        f"{MARKS}::test_what_was_discarded_before_its_failure_could_be_recorded_stays_discarded",
    ),
    Mutant(
        "an ordered handler asks for no predecessor",
        "dovecote/consumer/transaction.py",
        "        if route.ordered and free:\n",
        "        if False:\n",
        f"{CONSUME}::test_an_event_parked_while_its_predecessor_commits_is_found_and_sent_on",
    ),
    Mutant(
        "an event goes although the one before it in its bundle must wait",
        "dovecote/store/deliveries.py",
        "if before is not None and (before.blocker not in here or before.blocker in waiting):",
        "if before is not None and before.blocker not in here:",
        f"{CONSUME}::test_of_one_bundle_the_second_waits_when_the_first_must_wait",
    ),
    Mutant(
        "an event is parked while the one before it is just being done",
        "dovecote/consumer/transaction.py",
        "        while blocked.in_flight is not None and self",
        "        while False and self",
        f"{CONSUME}::test_an_event_is_acted_on_at_once_when_the_one_before_it_soon_ends",
    ),
    Mutant(
        "what waits is not sent on by the one it waited for",
        "dovecote/consumer/transaction.py",
        "            self._deliveries.release_next(done)\n",
        "            pass\n",
        f"{CONSUME}::test_an_event_waits_for_the_one_before_it_in_another_worker_s_hands",
    ),
    Mutant(
        "an event parked while the one before it commits is left to the relay",
        "dovecote/consumer/consumer.py",
        "            self._retry(partial(self._release_parked, bundle.route, outcome.parked))\n",
        "            pass\n",
        f"{RELEASING}::test_an_event_parked_during_the_commit_of_the_one_before_it_goes_on_at_once",
    ),
    Mutant(
        "who parks does not wait for the commit of the one before",
        "dovecote/migrations/sql/0006_order.up.sql",
        "while not pg_catalog.pg_try_advisory_xact_lock(",
        "while false and not pg_catalog.pg_try_advisory_xact_lock(",
        f"{RELEASING}::test_an_event_parked_during_the_commit_of_the_one_before_it_goes_on_at_once",
    ),
    Mutant(
        "one that failed takes along what waits behind it",
        "dovecote/migrations/sql/0006_order.up.sql",
        "continue when due.attempts > 0 or due.error is not null or",
        "continue when",
        f"{RELEASING}::test_one_that_fails_again_and_again_takes_nothing_along",
    ),
    Mutant(
        "one that was released goes alone",
        "dovecote/migrations/sql/0006_order.up.sql",
        "continue when behind < 1;",
        "continue;",
        f"{RELEASING}::test_a_released_event_is_written_once_and_sent_in_full_bundles",
    ),
    Mutant(
        "a lease that was lost takes more along",
        "dovecote/migrations/sql/0006_order.up.sql",
        "or due.error is not null or due.leased_until is not null;",
        "or due.error is not null;",
        f"{RELEASING}::test_a_message_that_was_leased_and_never_sent_goes_out_again_as_it_was",
    ),
    Mutant(
        "a bundle of released events is as large as they are",
        "dovecote/migrations/sql/0006_order.up.sql",
        "exit when size > of_bundle;",
        "",
        f"{RELEASING}::test_a_bundle_of_released_events_is_bounded_in_bytes",
    ),
    Mutant(
        "an event is released although the one before it is not done",
        "dovecote/migrations/sql/0006_order.up.sql",
        "then d.event_id not in (select b.event_id from blocked b)",
        "then true",
        f"{RELEASING}::test_an_event_whose_predecessor_is_under_way_is_not_released",
    ),
    Mutant(
        "misplaced rows wait for ever",
        "dovecote/relay/leader.py",
        "            leases.release_unblocked(self._connection, route, self._cursors[route.handler])\n",
        "                pass\n",
        f"{RELAY}::test_an_event_that_waits_although_the_one_before_it_is_done_is_sent_by_the_relay",
    ),
    Mutant(
        "a discarded event blocks its aggregate",
        "dovecote/migrations/sql/0006_order.up.sql",
        "is distinct from 'discarded'",
        "is distinct from 'nothing'",
        f"{CONSUME}::test_discarding_an_event_that_waits_frees_nobody_behind_it",
    ),
    Mutant(
        "an attempt counts for nothing",
        "dovecote/consumer/attempts.py",
        "attempts = so_far.attempts + 1",
        "attempts = so_far.attempts or 1",
        f"{CONSUME}::test_a_transient_refusal_is_tried_again",
    ),
    Mutant(
        "a failure is counted again when its record is written again",
        "dovecote/consumer/consumer.py",
        "                if so_far is None:\n",
        "                if True:\n",
        f"{CONSUME}::test_a_failure_whose_record_was_committed_without_a_reply_counts_once",
    ),
    Mutant(
        "a server that only the handler uses is waited for",
        "dovecote/consumer/retrying.py",
        "if self._outages_elsewhere <= _MAX_OUTAGES_ELSEWHERE:",
        "if True:",
        f"{CONSUME}::test_a_server_that_is_away_for_the_handler_alone_holds_up_no_other_event",
    ),
    Mutant(
        "what a frozen worker has locked is a failure of others",
        "dovecote/bootstrap.py",
        "        lock_timeout=settings.database.statement_timeout_ms // 2,\n",
        "",
        f"{CONSUME}::test_what_a_frozen_worker_has_locked_is_waited_for_and_spends_no_attempt",
    ),
    Mutant(
        "a bundle that says nothing to Postgres loses its session",
        "dovecote/consumer/transaction.py",
        "                self._uow.session.execute(_keep_alive)\n",
        "                pass\n",
        f"{CONSUME}::test_a_long_bundle_that_has_nothing_to_say_to_postgres_is_not_taken_for_frozen",
    ),
    Mutant(
        "a provider that is away spends attempts",
        "dovecote/consumer/attempts.py",
        "isinstance(self.error, GatewayUnavailable | UnknownEvent | UnknownHandler) or is_transient(self.error)",
        "False",
        f"{CONSUME}::test_a_provider_that_is_away_spends_no_attempt",
    ),
)
