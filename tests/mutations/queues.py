"""Mutants of what keeps writers, sessions and full queues from stopping each other."""

from tests.mutations.mutant import Mutant
from tests.mutations.sql_files import ORDER_SQL, OUTBOX_SQL, PROGRESS_SQL, REPLAYS_SQL, RETENTION_SQL

HOSTILE = "tests/dovecote/settings/test_hostile_settings.py"
FULL_NOTIFY = "tests/dovecote/relay/test_full_notify_queue.py"

POSTPONED = "tests/dovecote/relay/test_postponer.py"
NEW_HANDLER = "tests/dovecote/relay/test_new_handler.py"
MISSING = "tests/dovecote/relay/test_recovery.py"


QUEUES = (
    # Wake-ups -----------------------------------------------------------------------------------
    Mutant(
        "a writer notifies a full queue",
        OUTBOX_SQL,
        "        if float8lt(pg_notification_queue_usage(), 0.5) then\n",
        "        if true then\n",
        FULL_NOTIFY,
    ),
    Mutant(
        "consumers and operators notify a full queue",
        OUTBOX_SQL,
        "0.5) then\n        perform pg_catalog.pg_notify(channel",
        "1.5) then\n        perform pg_catalog.pg_notify(channel",
        FULL_NOTIFY,
    ),
    Mutant(
        "a relay does not start while the queue of notifications is full",
        "dovecote/relay/relay.py",
        "            except psycopg.errors.ProgramLimitExceeded as error:",
        "            except ZeroDivisionError as error:",
        FULL_NOTIFY,
    ),
    Mutant(
        "nobody frees the queue of notifications",
        "dovecote/relay/leader.py",
        '            self._connection.execute("select pg_notification_queue_usage()")\n',
        "",
        FULL_NOTIFY,
    ),
    # Where a new handler begins -----------------------------------------------------------------
    Mutant(
        "a new handler is told what was published above the checkpoint",
        "dovecote/store/subscriptions.py",
        "coalesce(before.published_above, published.above)",
        "'{}'",
        NEW_HANDLER,
    ),
    Mutant(
        "a new version of a fact begins now",
        "dovecote/store/subscriptions.py",
        "    ) before on true",
        "    ) before on false",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time is missing",
        "dovecote/store/progress.py",
        "      and not w.published_above @> found.position\n",
        "",
        MISSING,
    ),
    Mutant(
        "what was published before a handler's time is waited for",
        ORDER_SQL,
        "not s.published_above @> o.position)\n          and not exists",
        "true)\n          and not exists",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time keeps a week",
        RETENTION_SQL,
        "and not s.published_above @> o.position and o.position > s.low_water_mark\n",
        "and o.position > s.low_water_mark\n",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time is never quiet",
        "tests/support/exact_counts.py",
        "      and (s.published_above is null or not s.published_above @> o.position)\n",
        "",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time is unprocessed",
        PROGRESS_SQL,
        "          and (isempty(w.published_above) or not w.published_above @> f.position)\n",
        "",
        NEW_HANDLER,
    ),
    Mutant(
        "a replay as missing may begin before a handler's time",
        REPLAYS_SQL,
        "greatest(s.since_position, upper(s.published_above) - 1)",
        "s.since_position",
        NEW_HANDLER,
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
        "a postponed handler is not told of late rows",
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
        Mutant(f"our sessions have no {name} of their own", "dovecote/store/connections.py", old, "", HOSTILE)
        for name, old in {
            "DateStyle": '    "datestyle": "ISO",\n',
            "IntervalStyle": '    "intervalstyle": "postgres",\n',
            "idle_session_timeout": '    "idle_session_timeout": 0,\n',
            "idle_in_transaction_session_timeout": '    "idle_in_transaction_session_timeout": 0,\n',
            "transaction_timeout": '    "transaction_timeout": 0,\n',
            "client_encoding": ', "client_encoding": "utf8"',
        }.items()
    ),
    Mutant(
        "a dead connection is handed out",
        "dovecote/store/connections.py",
        "if idle_since is not None and time",
        "if False and time",
        HOSTILE,
    ),
    Mutant(
        "a handler's own transaction_timeout is an outage",
        "dovecote/telemetry/failures.py",
        "isinstance(cause, psycopg.errors.TransactionTimeout)",
        "isinstance(cause, ZeroDivisionError)",
        HOSTILE,
    ),
    Mutant(
        "what cannot be written is called an outage",
        "dovecote/consumer/retrying.py",
        "    if is_transient(error):\n        log.warning(",
        "    if True:\n        log.warning(",
        HOSTILE,
    ),
)
