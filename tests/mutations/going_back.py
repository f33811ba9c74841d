"""Mutants of what holds when Postgres goes back: history, the look into the outbox, positions, standbys."""

from tests.mutations.mutant import Mutant

HISTORY = "tests/dovecote/relay/test_history.py"
LOOKUP = "tests/dovecote/store/test_lookup.py"
SEQUENCE = "tests/dovecote/relay/test_sequence.py"
STANDBY = "tests/dovecote/relay/test_standby_flush.py"
CLAIM = "dovecote/broker/lua/claim.lua"
SEQUENCE_SQL = "migrations/sql/0025_sequence.up.sql"
FUNCTIONS_SQL = "migrations/sql/0027_functions.up.sql"
LOOKUP_SQL = "migrations/sql/0024_lookup.up.sql"
RELAY = "tests/dovecote/relay/test_relay.py"
BROKER = "tests/dovecote/broker/test_broker.py"

GOING_BACK = (
    Mutant(
        "a sequence that was set back is read on",
        "dovecote/store/reader.py",
        "if row[0] < self._watermark[0]:",
        "if False:",
        f"{SEQUENCE}::test_a_reader_ends_where_the_sequence_was_set_back",
    ),
    Mutant(
        "a relay leads whatever is wrong with the sequence",
        "dovecote/relay/relay.py",
        "if self._may_lead(connection, leadership):",
        "if True:",
        f"{SEQUENCE}::test_a_relay_refuses_a_sequence_that_is_behind_and_leads_once_it_is_recovered",
    ),
    Mutant(
        "nobody looks at the sequence while a relay leads",
        "dovecote/relay/leader.py",
        "        self._sequence.look()\n",
        "",
        f"{SEQUENCE}::test_a_sequence_that_is_altered_ends_the_leadership[cache 20]",
    ),
    Mutant(
        "what was written before the sequence was mended by hand stays unread",
        "dovecote/store/sequence.py",
        "    if was_refused:\n",
        "    if False:\n",
        f"{SEQUENCE}::test_a_sequence_that_is_repaired_by_hand_hides_nothing_that_was_written_before"
        "[select setval('dovecote.outbox_position', 21, false)]",
    ),
    Mutant(
        "an idle leader does not notice that the sequence was recovered",
        "dovecote/store/sequence.py",
        "if epoch != self._epoch:",
        "if False:",
        f"{SEQUENCE}::test_a_leader_ends_where_the_sequence_was_recovered_under_another_epoch",
    ),
    Mutant(
        "recovering does not wait for who has written, and sessions keep their blocks",
        "dovecote/migrations/sql/0011_sequence.up.sql",
        "    alter sequence dovecote.outbox_position cache 1;\n",
        "",
        f"{SEQUENCE}::test_recovering_waits_for_who_has_written_and_then_gives_up",
    ),
    Mutant(
        "events keep the positions that hide them",
        "dovecote/migrations/sql/0011_sequence.up.sql",
        "update dovecote.outbox o set position = found.position from found where o.id = found.event_id;",
        "update dovecote.outbox o set position = o.position from found where o.id = found.event_id;",
        f"{SEQUENCE}::test_a_relay_refuses_a_sequence_that_is_behind_and_leads_once_it_is_recovered",
    ),
    Mutant(
        "an event that was read gets a new position too",
        "dovecote/migrations/sql/0011_sequence.up.sql",
        "and coalesce(not batch.was_read, o.position",
        "and (true or o.position",
        f"{SEQUENCE}::test_the_command_says_in_words_and_numbers_what_it_would_do_and_does",
    ),
    Mutant(
        "a sequence that was not called yet has handed out nothing",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "    select case when s.is_called then s.last_value else s.last_value - 1 end into",
        "    select case when s.is_called then s.last_value else 0 end into",
        f"{SEQUENCE}::test_whatever_is_known_of_positions_has_to_be_behind_the_sequence"
        "[select setval('dovecote.outbox_position', 7, false)-]",
    ),
    Mutant(
        "a batch does not wait for a standby",
        "dovecote/relay/leader.py",
        "        self._standby.await_flush()\n        sent = 0\n",
        "        sent = 0\n",
        f"{STANDBY}::test_nothing_is_published_that_no_standby_has",
    ),
    Mutant(
        "what nobody flushes is waited for",
        "dovecote/relay/standby_flush.py",
        "                self._records.execute(_FLUSH)\n",
        "",
        f"{STANDBY}::test_nothing_is_published_that_no_standby_has",
    ),
    Mutant(
        "an older relay takes the marker back",
        CLAIM,
        "if found > tonumber(ARGV[1]) or",
        "if",
        f"{BROKER}::test_only_the_newest_epoch_publishes",
    ),
    Mutant(
        "a relay that came in between is not noticed by who claims",
        CLAIM,
        "or (known[1] or '') ~= ARGV[5] then",
        "then",
        f"{BROKER}::test_redis_is_claimed_only_where_it_remembers_what_was_written_to_it",
    ),
    Mutant(
        "the marker is not compared where it is claimed",
        CLAIM,
        "if found ~= tonumber(ARGV[6]) or",
        "if",
        f"{BROKER}::test_redis_is_claimed_only_where_it_remembers_what_was_written_to_it",
    ),
    Mutant(
        "the run of Postgres that Redis knows is not compared",
        CLAIM,
        "or known[2] ~= ARGV[3]\n",
        "\n",
        f"{BROKER}::test_redis_is_claimed_only_where_it_remembers_what_was_written_to_it",
    ),
    Mutant(
        "a Redis that went back with its memory is taken for known",
        CLAIM,
        "or heartbeat < tonumber(ARGV[7]) or",
        "or",
        f"{BROKER}::test_redis_is_claimed_only_where_it_remembers_what_was_written_to_it",
    ),
    Mutant(
        "a Postgres that went back with its memory is taken for known",
        CLAIM,
        "or heartbeat > tonumber(ARGV[4]) then",
        "then",
        f"{BROKER}::test_redis_is_claimed_only_where_it_remembers_what_was_written_to_it",
    ),
    Mutant(
        "a leader does not notice that Redis went back by a heartbeat",
        "dovecote/broker/lua/heartbeat.lua",
        "or heartbeat < tonumber(ARGV[4]) or",
        "or",
        f"{HISTORY}::test_a_leader_notices_within_a_beat_that_redis_is_not_as_it_left_it",
    ),
    Mutant(
        "a relay that was left behind drops what its follower has sent",
        "dovecote/broker/lua/drop.lua",
        "or redis.call('hget', KEYS[4], 'history') ~= ARGV[2] then",
        "then",
        f"{BROKER}::test_a_relay_of_another_history_publishes_nothing_though_its_epoch_is_the_same",
    ),
    Mutant(
        "others' messages are dropped with ours",
        "dovecote/broker/lua/drop.lua",
        "if #id == 33 and string.find(id, '^[br][0-9a-f]+$') then",
        "if true then",
        f"{BROKER}::test_what_is_dropped_is_ours_on_every_queue_there_is",
    ),
    Mutant(
        "marks of messages that were dropped stay",
        "dovecote/broker/lua/drop.lua",
        "    redis.pcall('hdel', KEYS[2] .. '.in_flight', unpack(ours))\n",
        "",
        f"{BROKER}::test_what_is_dropped_is_ours_on_every_queue_there_is",
    ),
    Mutant(
        "messages held for a paused handler are not dropped",
        "dovecote/relay/fence.py",
        "[*((queue, queue) for queue in queues), *held]",
        "[(queue, queue) for queue in queues]",
        f"{BROKER}::test_what_is_dropped_is_ours_on_every_queue_there_is",
    ),
    Mutant(
        "a system whose namespace begins as ours loses its messages",
        "dovecote/relay/fence.py",
        '            if ":" not in queue\n',
        "",
        f"{BROKER}::test_what_is_dropped_is_ours_on_every_queue_there_is",
    ),
    Mutant(
        "another run of Postgres is taken for the one that knew Redis",
        "dovecote/relay/history.py",
        "taken.known_redis if taken.instance == taken.run else None",
        "taken.known_redis",
        f"{HISTORY}::test_a_new_leader_begins_a_new_history_where_anything_is_not_as_it_was_left",
    ),
    Mutant(
        "Redis gets a heartbeat that is not on disk",
        "dovecote/store/relay_state.py",
        "    select setval('dovecote.relay_heartbeat', %s), {_DURABLY}\n",
        "    select setval('dovecote.relay_heartbeat', %s)\n",
        f"{HISTORY}::test_a_crash_that_forgets_what_was_acknowledged_forgets_no_event",
    ),
    Mutant(
        "the heartbeat moves while nothing is under way",
        "dovecote/relay/history.py",
        "or not (self._under_way or self._broker.sent != self._sent):",
        "or False:",
        f"{HISTORY}::test_the_beat_stands_still_while_nothing_is_under_way",
    ),
    Mutant(
        "the heartbeat stands still while messages wait",
        "dovecote/relay/history.py",
        "self._under_way or usage.under_way",
        "False",
        f"{HISTORY}::test_the_beat_stands_still_while_nothing_is_under_way",
    ),
    Mutant(
        "the epoch goes up one by one",
        "dovecote/store/relay_state.py",
        "set epoch = greatest(state.epoch, before.past) + 1",
        "set epoch = state.epoch + 1",
        f"{HISTORY}::test_the_epoch_jumps_past_everything_that_redis_has_heard_of",
    ),
    Mutant(
        "a relay of an older Postgres leads",
        "dovecote/relay/history.py",
        "if is_alive and ours and theirs and theirs.is_newer_than(ours):",
        "if False:",
        f"{HISTORY}::test_a_relay_stands_back_while_one_of_a_newer_postgres_lives",
    ),
    Mutant(
        "a leader that sends again for long is taken for dead",
        "dovecote/relay/history.py",
        "            with self._heartbeats():\n                send_again()\n",
        "            send_again()\n",
        f"{HISTORY}::test_a_leader_that_sends_again_for_long_is_not_taken_for_dead",
    ),
    Mutant(
        "two sessions of one leadership may lead to two servers",
        "dovecote/relay/history.py",
        "        if (found := server_run(self._records)) != self._claim.instance:\n",
        "        if (found := server_run(self._records)) is None:\n",
        f"{HISTORY}::test_both_sessions_of_a_leader_are_of_one_run",
    ),
    Mutant(
        "a leader takes Redis back from a newer Postgres",
        "dovecote/relay/history.py",
        "        require_right_of_way(self._claim.instance, seen)\n",
        "",
        f"{HISTORY}::test_a_leader_whose_redis_a_newer_postgres_has_taken_drops_nothing_there",
    ),
    Mutant(
        "a Redis is known before what it lost is sent again",
        "dovecote/relay/history.py",
        "        self._confirmed_heartbeat = self._claim.heartbeat\n        if self._sends_again:\n",
        "        self._confirmed_heartbeat = self._claim.heartbeat\n"
        "        relay_state.remember_redis(self._connection, self.epoch, self._known_redis)\n"
        "        if self._sends_again:\n",
        f"{HISTORY}::test_a_redis_is_known_only_when_all_that_it_lost_is_sent_again",
    ),
    Mutant(
        "any event of that id is the event",
        "dovecote/migrations/sql/0003_relay.up.sql",
        'where (select o."position" = event."position" and o.event_type = event.type',
        'where (select o."position" = event."position" ',
        f"{LOOKUP}::test_what_is_not_in_the_outbox_is_passed_over_and_its_neighbours_are_not",
    ),
    Mutant(
        "an event at another position is the event",
        "dovecote/migrations/sql/0003_relay.up.sql",
        'where (select o."position" = event."position" and o.event_type = event.type',
        "where (select o.event_type = event.type",
        f"{LOOKUP}::test_what_is_not_in_the_outbox_is_passed_over_and_its_neighbours_are_not",
    ),
    Mutant(
        "what does not say its run is of this one",
        "dovecote/store/lookup.py",
        "where (select is_other from run) is not false\n",
        "where (select is_other from run)\n",
        f"{LOOKUP}::test_a_retry_of_what_is_not_in_the_outbox_is_passed_over",
    ),
    Mutant(
        "every bundle is looked up",
        "dovecote/store/lookup.py",
        "where (select is_other from run) is not false\n",
        "where true\n",
        f"{LOOKUP}::test_the_outbox_is_not_asked_about_what_was_sent_in_this_run_of_postgres",
    ),
    Mutant(
        "a copy of the database is the same run",
        "dovecote/migrations/sql/0003_relay.up.sql",
        "pg_catalog.pg_relation_filepath('dovecote.relay_state'::regclass)",
        "''",
        f"{LOOKUP}::test_a_copy_of_the_database_is_another_run",
    ),
    Mutant(
        "what a hand has written into a message is asked as it is",
        "dovecote/store/lookup.py",
        'envelope.type.replace("\\0", "\\ufffd")',
        "envelope.type",
        f"{LOOKUP}::test_code_that_has_no_route_for_what_is_not_in_the_outbox_keeps_nothing_of_it",
    ),
    Mutant(
        "what is acted on in another history is acknowledged",
        "dovecote/store/lookup.py",
        "    if not found.absent and not found.of_other_run:\n",
        "    if not found.absent:\n",
        f"{LOOKUP}::test_messages_of_another_history_are_held_until_it_is_ours",
    ),
    Mutant(
        "what is absent in another history is acknowledged",
        "dovecote/store/lookup.py",
        "    if not found.absent and not found.of_other_run:\n",
        "    if True:\n",
        f"{LOOKUP}::test_messages_of_another_history_are_held_until_it_is_ours",
    ),
    Mutant(
        "an effect is lost in a crash that its acknowledgement survives",
        "dovecote/store/lookup.py",
        "select dovecote.outbox_run() <> %(sent_in)s::text, {DURABLE}",
        "select dovecote.outbox_run() <> %(sent_in)s::text, null",
        f"{LOOKUP}::test_what_a_message_is_acknowledged_for_is_committed_durably",
    ),
)
