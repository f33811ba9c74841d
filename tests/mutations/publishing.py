"""Mutants of how the relay publishes, and of who leads."""

from tests.mutations.mutant import Mutant

HELD = "tests/dovecote/relay/test_held_writers.py"
RELAY = "tests/dovecote/relay/test_relay.py"
HISTORY = "tests/dovecote/relay/test_history.py"
BROKER = "tests/dovecote/broker/test_broker.py"
LOCKS_SQL = "migrations/sql/0032_leader_lock.up.sql"

PUBLISHING = (
    # Publishing ---------------------------------------------------------------------------------
    Mutant(
        "a batch is recorded and not sent",
        "dovecote/relay/leader.py",
        "            self._send(lambda: self._bundler.bundles(batch.rows, upto))\n            if not",
        "            if not",
        f"{RELAY}::test_exactly_the_positions_published_are_recorded",
    ),
    Mutant(
        "an old epoch may record",
        "dovecote/store/published_batches.py",
        "from dovecote.relay_state where epoch = %(epoch)s for no key update",
        "from dovecote.relay_state where epoch >= 0 for no key update",
        f"{HELD}::test_a_record_that_waits_for_a_take_over_is_refused",
    ),
    Mutant(
        "the epoch of a record is read and not locked",
        "dovecote/store/published_batches.py",
        "where epoch = %(epoch)s for no key update) as owner",
        "where epoch = %(epoch)s) as owner",
        f"{HELD}::test_a_record_that_waits_for_a_take_over_is_refused",
    ),
    Mutant(
        "an old epoch goes on although its record was refused",
        "dovecote/store/relay_state.py",
        "    if rows != 1:\n",
        "    if False:\n",
        f"{RELAY}::test_a_relay_whose_record_is_refused_ends",
    ),
    Mutant(
        "an old epoch may publish",
        "dovecote/broker/lua/publish.lua",
        "if epoch > tonumber(ARGV[1]) then",
        "if false then",
        f"{RELAY}::test_a_relay_of_an_old_epoch_cannot_publish",
    ),
    Mutant(
        "an empty Redis is published to as if it knew us",
        "dovecote/broker/lua/publish.lua",
        "if epoch < tonumber(ARGV[1]) then",
        "if false then",
        f"{BROKER}::test_a_redis_that_went_back_to_an_older_epoch_takes_nothing",
    ),
    Mutant(
        "a relay of another history may publish",
        "dovecote/broker/lua/publish.lua",
        "if redis.call('hget', KEYS[2], 'history') ~= ARGV[2] then",
        "if false then",
        f"{BROKER}::test_a_relay_of_another_history_publishes_nothing_though_its_epoch_is_the_same",
    ),
    Mutant(
        "a message that is sent again has the id of the one that was dropped",
        "dovecote/relay/leader.py",
        "        self._bundler.salt = self._history.salt\n",
        "",
        f"{HISTORY}::test_a_leader_notices_within_a_beat_that_redis_is_not_as_it_left_it",
    ),
    Mutant(
        "a message is queued again while it is queued",
        "dovecote/broker/lua/publish.lua",
        "if redis.call('hexists', ARGV[i] .. '.msgs', ARGV[i + 1]) == 0 then",
        "if redis.call('hset', ARGV[i] .. '.msgs', ARGV[i + 1], ARGV[i + 2]) >= 0 then",
        f"{BROKER}::test_a_message_is_queued_once_until_it_is_done",
    ),
    Mutant(
        "nobody looks whether Redis is the one we knew",
        "dovecote/relay/leader.py",
        "        self._unrouted.write(self._records)\n        self._retry_while_unavailable(self._check_redis)\n",
        "        self._unrouted.write(self._records)\n",
        f"{RELAY}::test_a_redis_emptied_and_marked_again_by_an_older_relay_is_not_taken_for_the_one_we_knew"
        "[the one that leads]",
    ),
    Mutant(
        "what Redis lost is not sent again",
        "dovecote/relay/leader.py",
        "sent = self._broker.publish(self._epoch, found)",
        "sent = sum(0 for _ in found)",
        f"{RELAY}::test_what_is_still_queued_is_not_queued_again_when_redis_has_lost_the_rest",
    ),
    Mutant(
        "a relay that leads is not alone",
        "dovecote/relay/leader_lock.py",
        "            self._session.execute(_TAKE)\n",
        "            pass\n",
        "tests/security/test_locks.py::test_the_lock_alone_keeps_a_second_relay_from_leading",
    ),
    Mutant(
        "the relay sleeps without a last look",
        "dovecote/relay/wakeup.py",
        "            self._stop.sleep(self._pause_seconds)\n",
        "            self._stop.sleep(self._pause_seconds)\n"
        "        else:\n            self._stop.sleep(self._settings.poll_interval_seconds, self._connection)\n",
        "tests/dovecote/relay/test_wakeup.py::test_the_relay_reads_once_more_between_taking_the_lock_and_sleeping",
    ),
    Mutant(
        "the relay forgets the active writers when it falls asleep",
        "dovecote/relay/wakeup.py",
        "        if not self._silent_writers:\n",
        "        if True:\n",
        f"{HELD}::test_what_a_writer_commits_that_was_active_when_the_relay_fell_asleep_is_found_soon",
    ),
    Mutant(
        "nobody asks for the active writers when the relay falls asleep",
        "dovecote/relay/wakeup.py",
        "        if self._holds_lock and self._silent_writers != frozenset():\n",
        "        if False:\n",
        f"{HELD}::test_what_a_writer_commits_that_was_active_when_the_relay_fell_asleep_is_found_soon",
    ),
    Mutant(
        "a writer that is held keeps the relay busy",
        "dovecote/relay/wakeup.py",
        "max(soon, taken * _SHARE_OF_A_TRANSACTION)",
        "soon",
        f"{HELD}::test_a_writer_that_sleeps_in_its_transaction_keeps_nobody_busy",
    ),
    Mutant(
        "a silent writer that is over is waited for",
        "dovecote/relay/wakeup.py",
        "self._silent_writers & in_flight",
        "self._silent_writers",
        f"{HELD}::test_a_relay_sleeps_for_its_whole_poll_once_the_last_silent_writer_is_over",
    ),
    Mutant(
        "a writer keeps the wake-up lock until its end",
        "dovecote/migrations/sql/0002_outbox.up.sql",
        "(case when pg_try_advisory_lock_shared(dovecote.wakeup_key())\n"
        "             then not pg_advisory_unlock_shared(dovecote.wakeup_key()) else true end)",
        "not pg_try_advisory_xact_lock_shared(dovecote.wakeup_key())",
        f"{HELD}::test_a_writer_keeps_no_lock_that_a_relay_must_have_to_sleep_and_notifies_once_it_sleeps",
    ),
    Mutant(
        "each batch writes the checkpoint",
        "dovecote/relay/leader.py",
        "        self._unrouted.meet(batch.rows)\n",
        "        self._unrouted.meet(batch.rows)\n        self.checkpoint = batch.checkpoint\n"
        "        self._record_checkpoint()\n",
        f"{HELD}::test_a_batch_leaves_no_version_of_the_relay_s_row_nor_of_an_unrouted_type",
    ),
    Mutant(
        "the checkpoint is written every second",
        "dovecote/relay/leader.py",
        "        if self.checkpoint > self._recorded_checkpoint:\n",
        "        if True:\n",
        f"{HELD}::test_an_idle_relay_writes_nothing",
    ),
    Mutant(
        "each batch writes what it met that is not routed",
        "dovecote/store/unrouted.py",
        "not self._met.keys() <= self._written",
        "bool(self._met)",
        f"{HELD}::test_a_batch_leaves_no_version_of_the_relay_s_row_nor_of_an_unrouted_type",
    ),
    Mutant(
        "a writer need not notify once the relay has slept",
        "dovecote/relay/wakeup.py",
        '            self._connection.execute("select pg_advisory_unlock(dovecote.wakeup_key())")\n',
        "",
        "tests/dovecote/relay/test_wakeup.py::test_writers_need_not_call_a_relay_that_stays_awake_after_it_has_slept",
    ),
    Mutant(
        "the relay waits for a worker that holds a retry",
        "dovecote/store/leases.py",
        "skip locked\n    )\n    update dovecote.deliveries d set next_attempt_at = now(), leased_until",
        "\n    )\n    update dovecote.deliveries d set next_attempt_at = now(), leased_until",
        f"{RELAY}::test_a_relay_waits_for_no_worker_that_holds_a_delivery",
    ),
    Mutant(
        "a retry that was sent is forgotten",
        "dovecote/store/leases.py",
        "next_attempt_at = lease.until, leased_until = lease.until,",
        "next_attempt_at = now() + interval '1 year', leased_until = now() + interval '1 year',",
        f"{RELAY}::test_a_retry_that_got_lost_is_sent_again_after_its_lease",
    ),
)
