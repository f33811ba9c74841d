"""Mutants of what keeps strangers' locks and rows that are not understood from stopping anybody."""

from tests.mutations.mutant import Mutant
from tests.mutations.sql_files import OUTBOX_SQL, RELAY_SQL

LOCKS_TEST, ROWS_TEST = "tests/security/test_locks.py", "tests/security/test_rows.py"
LEADERSHIP_PY, ACTIVE_PY = "dovecote/relay/leader_lock.py", "dovecote/store/active_replays.py"

LOCKS = (
    Mutant(
        "what a stranger announces counts",
        RELAY_SQL,
        "    ) h\n    where h.inserts;\n",
        "    ) h;\n",
        f"{LOCKS_TEST}::test_what_a_stranger_announces_is_not_heeded",
    ),
    Mutant(
        "a writer takes a forged announcement for its own",
        OUTBOX_SQL,
        "        if pg_current_xact_id() is not null\n",
        "        if announced >= 0 then return null; end if;\n        if pg_current_xact_id() is not null\n",
        f"{LOCKS_TEST}::test_a_writer_that_says_it_has_announced_announces",
    ),
    Mutant(
        "the leader does not look after the session that holds its lock",
        LEADERSHIP_PY,
        "                self._lost = why\n",
        "                self._lost = None\n",
        f"{LOCKS_TEST}::test_postgres_ends_the_working_session_of_a_leader_that_is_silent_and_the_leadership_with_it",
    ),
    Mutant(
        "a silent leader keeps its lock",
        LEADERSHIP_PY,
        'f"set idle_in_transaction_session_timeout = {timeout_ms}"',
        '"set idle_in_transaction_session_timeout = 0"',
        f"{LOCKS_TEST}::test_postgres_takes_the_lock_from_a_leader_that_is_silent_whatever_its_login",
    ),
    Mutant(
        "wake-ups that bring nothing keep the relay busy",
        "dovecote/relay/wakeup.py",
        "        self._idle_wakeups += 1\n",
        "",
        f"{LOCKS_TEST}::test_wake_ups_that_bring_nothing_are_followed_by_a_pause",
    ),
    Mutant(
        "the relay acts again whatever the route says",
        ACTIVE_PY,
        'replay.mode == "reprocess" and not route.replayable',
        "False",
        f"{ROWS_TEST}::test_a_replay_that_acts_again_is_refused_by_the_relay_where_the_route_does_not_allow_it",
    ),
    Mutant(
        "the relay passes over an unknown key of a filter",
        "dovecote/store/replays.py",
        '                raise NotUnderstood(f"unknown key {_shown(name)} in its filter")\n',
        "                continue\n",
        "tests/security/test_rows.py::test_a_replay_that_is_not_understood_is_left_alone_and_shown[0]",
    ),
)
