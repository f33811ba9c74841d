"""Mutants of what keeps writers, sessions and full queues from stopping each other."""

from tests.mutations.mutant import Mutant

HOSTILE = "tests/dovecote/settings/test_hostile_settings.py"
CIRCLE = "test_the_whole_circle_under"
FULL_NOTIFY = "tests/dovecote/relay/test_full_notify_queue.py"

POSTPONED = "tests/dovecote/relay/test_postponer.py"
NEW_HANDLER = "tests/dovecote/relay/test_new_handler.py"
MISSING = "tests/dovecote/relay/test_recovery.py"

POSTPONED_SQL = "migrations/sql/0020_postponed.up.sql"
WAKEUP_SQL = "migrations/sql/0018_wakeup.up.sql"

QUEUES = (
    # Wake-ups -----------------------------------------------------------------------------------
    Mutant(
        "a writer notifies a full queue",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "        if float8lt(pg_notification_queue_usage(), 0.5) then\n",
        "        if true then\n",
        f"{FULL_NOTIFY}::test_everybody_is_taken_while_the_queue_is_full",
    ),
    Mutant(
        "consumers and operators notify a full queue",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "0.5) then\n        perform pg_catalog.pg_notify(channel",
        "1.5) then\n        perform pg_catalog.pg_notify(channel",
        f"{FULL_NOTIFY}::test_an_operator_s_retry_is_taken",
    ),
    Mutant(
        "a relay does not start while the queue of notifications is full",
        "dovecote/relay/relay.py",
        "            except psycopg.errors.ProgramLimitExceeded as error:",
        "            except ZeroDivisionError as error:",
        f"{FULL_NOTIFY}::test_a_relay_starts_while_the_queue_is_full_and_doctor_says_who_holds_it",
    ),
    Mutant(
        "nobody frees the queue of notifications",
        "dovecote/relay/leader.py",
        '            self._connection.execute("select pg_notification_queue_usage()")\n',
        "",
        f"{FULL_NOTIFY}::test_the_relay_frees_the_queue_when_its_cause_is_gone",
    ),
    # Where a new handler begins -----------------------------------------------------------------
    Mutant(
        "a new handler gets what was published above the checkpoint",
        "dovecote/store/subscriptions.py",
        "coalesce(before.published_above, published.above)",
        "'{}'",
        f"{NEW_HANDLER}::test_what_a_dawdling_writer_commits_is_the_new_handler_s_and_nothing_before[any order]",
    ),
    Mutant(
        "a new version of an event begins now",
        "dovecote/store/subscriptions.py",
        "    ) before on true",
        "    ) before on false",
        f"{NEW_HANDLER}::test_a_new_version_of_an_event_begins_where_the_event_did",
    ),
    Mutant(
        "what was published before a handler's time is missing",
        "dovecote/store/progress.py",
        "      and not w.published_above @> found.position\n",
        "",
        f"{MISSING}::test_what_a_handler_does_not_want_is_not_missing_among_what_it_wants",
    ),
    Mutant(
        "what was published before a handler's time is waited for",
        "dovecote/migrations/sql/0006_order.up.sql",
        "not s.published_above @> o.position)\n          and not exists",
        "true)\n          and not exists",
        f"{NEW_HANDLER}::test_only_what_is_the_handler_s_is_waited_for",
    ),
    Mutant(
        "what was published before a handler's time keeps a week",
        "dovecote/migrations/sql/0010_retention.up.sql",
        "and not s.published_above @> o.position and o.position > s.low_water_mark\n",
        "and o.position > s.low_water_mark\n",
        f"{NEW_HANDLER}::test_what_a_dawdling_writer_commits_is_the_new_handler_s_and_nothing_before[any order]",
    ),
    Mutant(
        "what was published before a handler's time is never quiet",
        "tests/support/exact_counts.py",
        "      and (s.published_above is null or not s.published_above @> o.position)\n",
        "",
        f"{NEW_HANDLER}::test_what_a_dawdling_writer_commits_is_the_new_handler_s_and_nothing_before[any order]",
    ),
    Mutant(
        "what was published before a handler's time is unprocessed",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "          and (isempty(w.published_above) or not w.published_above @> f.position)\n",
        "",
        f"{NEW_HANDLER}::test_what_a_dawdling_writer_commits_is_the_new_handler_s_and_nothing_before[any order]",
    ),
    Mutant(
        "a replay as missing may begin before a handler's time",
        "dovecote/migrations/sql/0008_replays.up.sql",
        "greatest(s.since_position, upper(s.published_above) - 1)",
        "s.since_position",
        f"{NEW_HANDLER}::test_a_replay_of_missing_events_says_where_its_order_begins",
    ),
    # Full queues --------------------------------------------------------------------------------
    Mutant(
        "a full queue takes more",
        "dovecote/relay/postponer.py",
        "            if size >= self._bound:\n",
        "            if False:\n",
        f"{POSTPONED}::test_a_queue_without_consumers_stops_only_its_own_handler",
    ),
    Mutant(
        "a queue has no share of maxmemory",
        "dovecote/relay/postponer.py",
        "        if usage.maxmemory:\n",
        "        if False:\n",
        f"{POSTPONED}::test_no_queue_takes_more_than_its_share_of_what_redis_has_room_for",
    ),
    Mutant(
        "a paused handler's messages burden its queue",
        "dovecote/broker/publisher.py",
        "            sizes[queue] -= size\n",
        "            pass\n",
        f"{POSTPONED}::test_what_is_held_for_a_paused_handler_is_no_burden_to_others_on_its_queue",
    ),
    Mutant(
        "nobody catches up",
        "dovecote/relay/leader.py",
        "        self._postponed.step()\n",
        "",
        f"{POSTPONED}::test_a_queue_without_consumers_stops_only_its_own_handler",
    ),
    Mutant(
        "who has caught up a part of it is live",
        "dovecote/relay/postponer.py",
        "        if upto < self.published_upto:\n",
        "        if False:\n",
        f"{POSTPONED}::test_a_queue_without_consumers_stops_only_its_own_handler",
    ),
    Mutant(
        "what a postponed handler misses is not written down",
        "dovecote/relay/postponer.py",
        "        self._rows.postpone(handler, self.published_upto)\n",
        "",
        f"{POSTPONED}::test_redis_and_relay_may_forget_while_a_handler_is_postponed",
    ),
    Mutant(
        "a replaced relay postpones",
        "dovecote/store/relay_state.py",
        "owner as (select epoch from dovecote.relay_state where epoch = %(epoch)s for no key update)",
        "owner as (select epoch from dovecote.relay_state for no key update)",
        f"{POSTPONED}::test_a_relay_that_was_replaced_postpones_nobody",
    ),
    Mutant(
        "a postponed handler is sent all that Redis lost",
        "dovecote/relay/leader.py",
        "self._give_up, self._postponed.after\n",
        "self._give_up, {}\n",
        f"{POSTPONED}::test_redis_and_relay_may_forget_while_a_handler_is_postponed",
    ),
    Mutant(
        "a postponed handler does not get late rows",
        "dovecote/relay/bundler.py",
        "if upto and position > upto.get(route.handler, position):",
        "if upto and route.handler in upto:",
        f"{POSTPONED}::test_a_writer_that_dawdles_while_a_handler_is_postponed_is_heard",
    ),
    Mutant(
        "retries go on to a full queue",
        "dovecote/relay/leader.py",
        "[route for route in self._routes if route.handler not in self._postponed.full]",
        "self._routes",
        f"{POSTPONED}::test_retries_and_replays_wait_for_room",
    ),
    Mutant(
        "replays go on to a full queue",
        "dovecote/relay/replayer.py",
        "if run.replay.handler_name in self._postponed:",
        "if False:",
        f"{POSTPONED}::test_retries_and_replays_wait_for_room",
    ),
    # Sessions -----------------------------------------------------------------------------------
    *(
        Mutant(
            f"our sessions have no {name} of their own", "dovecote/store/connections.py", old, "", f"{HOSTILE}::{test}"
        )
        for name, old, test in [
            ("DateStyle", '    "datestyle": "ISO",\n', f"{CIRCLE}[datestyle = 'German, DMY']"),
            ("IntervalStyle", '    "intervalstyle": "postgres",\n', f"{CIRCLE}[intervalstyle = 'iso_8601']"),
            (
                "idle_session_timeout",
                '    "idle_session_timeout": 0,\n',
                "test_a_silence_costs_neither_a_leadership_nor_a_writer_s_unit_of_work",
            ),
            (
                "idle_in_transaction_session_timeout",
                '    "idle_in_transaction_session_timeout": 0,\n',
                f"{CIRCLE}[idle_in_transaction_session_timeout = '50ms']",
            ),
            ("transaction_timeout", '    "transaction_timeout": 0,\n', f"{CIRCLE}[transaction_timeout = '100ms']"),
            ("client_encoding", ', "client_encoding": "utf8"', f"{CIRCLE}[client_encoding = 'LATIN1']"),
        ]
    ),
    Mutant(
        "a dead connection is handed out",
        "dovecote/store/connections.py",
        "if idle_since is not None and time",
        "if False and time",
        f"{HOSTILE}::test_a_connection_that_ended_while_it_was_idle_is_replaced_before_anybody_has_it",
    ),
    Mutant(
        "a handler's own transaction_timeout is an outage",
        "dovecote/telemetry/failures.py",
        "isinstance(cause, psycopg.errors.TransactionTimeout)",
        "isinstance(cause, ZeroDivisionError)",
        f"{HOSTILE}::test_a_transaction_timeout_that_a_handler_sets_is_its_failure_and_no_outage",
    ),
    Mutant(
        "what cannot be written is called an outage",
        "dovecote/consumer/retrying.py",
        "    if is_transient(error):\n        log.warning(",
        "    if True:\n        log.warning(",
        f"{HOSTILE}::test_a_record_that_cannot_be_written_is_held_and_says_why",
    ),
)
