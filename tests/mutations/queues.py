"""Mutants of what keeps writers, sessions and full queues from stopping each other."""

from tests.mutations.mutant import Mutant

HOSTILE = "tests/workers/test_hostile_settings.py"
FULL_NOTIFY = "tests/workers/test_full_notify_queue.py"

NEW_HANDLER = "tests/workers/relay/test_new_handler.py"

POSTPONED_SQL = "migrations/sql/0020_postponed.up.sql"
WAKEUP_SQL = "migrations/sql/0018_wakeup.up.sql"

QUEUES = (
    # Wake-ups -----------------------------------------------------------------------------------
    Mutant(
        "a writer notifies a full queue",
        WAKEUP_SQL,
        "            if pg_catalog.float8lt(pg_catalog.pg_notification_queue_usage(), 0.5) then\n",
        "            if true then\n",
        FULL_NOTIFY,
    ),
    Mutant(
        "consumers and operators notify a full queue",
        WAKEUP_SQL,
        "0.5) then\n        perform pg_catalog.pg_notify(channel",
        "1.5) then\n        perform pg_catalog.pg_notify(channel",
        FULL_NOTIFY,
    ),
    Mutant(
        "a relay does not start while the queue of notifications is full",
        "workers/relay/relay.py",
        "            except psycopg.errors.ProgramLimitExceeded as error:",
        "            except ZeroDivisionError as error:",
        FULL_NOTIFY,
    ),
    Mutant(
        "nobody frees the queue of notifications",
        "workers/relay/leading.py",
        '            self._connection.execute("select pg_notification_queue_usage()")\n',
        "",
        FULL_NOTIFY,
    ),
    # Where a new handler begins -----------------------------------------------------------------
    Mutant(
        "a new handler is told what was published above the checkpoint",
        "workers/relay/relay.py",
        "coalesce(before.published_above, published.above)",
        "'{}'",
        NEW_HANDLER,
    ),
    Mutant(
        "a new version of a fact begins now",
        "workers/relay/relay.py",
        "    ) before on true",
        "    ) before on false",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time is missing",
        "workers/relay/missing.py",
        "and not s.published_above @> o.position and",
        "and",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time is waited for",
        POSTPONED_SQL,
        "          and (s.published_above is null or not s.published_above @> o.position)\n",
        "",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time keeps a week",
        POSTPONED_SQL,
        "             and not s.published_above @> o.position\n",
        "",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time is never quiet",
        "workers/operations/counting.py",
        "      and (s.published_above is null or not s.published_above @> o.position)\n",
        "",
        NEW_HANDLER,
    ),
    Mutant(
        "what was published before a handler's time is under way",
        "workers/operations/status.py",
        "      and (s.published_above is null or not s.published_above @> n.position)\n",
        "",
        NEW_HANDLER,
    ),
    Mutant(
        "a replay as missing may begin before a handler's time",
        "workers/operations/replay_plans.py",
        "greatest(s.since_position, upper(s.published_above) - 1)",
        "s.since_position",
        NEW_HANDLER,
    ),
    # Sessions -----------------------------------------------------------------------------------
    *(
        Mutant(f"our sessions have no {name} of their own", "domain/database.py", old, "", HOSTILE)
        for name, old in {
            "DateStyle": '    "datestyle": "ISO",\n',
            "IntervalStyle": '    "intervalstyle": "postgres",\n',
            "idle_session_timeout": '    "idle_session_timeout": 0,\n',
            "idle_in_transaction_session_timeout": '    "idle_in_transaction_session_timeout": 0,\n',
            "transaction_timeout": '    "transaction_timeout": 0,\n',
            "client_encoding": '            "client_encoding": "utf8",\n',
        }.items()
    ),
    Mutant(
        "a dead connection is handed out",
        "domain/database.py",
        "if idle_since is not None and time",
        "if False and time",
        HOSTILE,
    ),
    Mutant(
        "a handler's own transaction_timeout is an outage",
        "workers/outages.py",
        "isinstance(cause, psycopg.errors.TransactionTimeout)",
        "isinstance(cause, ZeroDivisionError)",
        HOSTILE,
    ),
    Mutant(
        "what cannot be written is called an outage",
        "workers/consume.py",
        "            if passes(error):\n                log.warning(",
        "            if True:\n                log.warning(",
        HOSTILE,
    ),
)
