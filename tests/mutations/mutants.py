"""The lines that protect something, each with a way to break it and the tests that must notice.

One entry breaks one thing. `old` stands exactly once in `file` (tests/mutations/test_mutants.py looks), `new` takes
its place, and at least one of `tests` must fail. Tests are named as pytest wants them; several are parted by spaces.
"""

from dataclasses import dataclass

READING = "tests/workers/relay/test_reading_forward.py"
GAPS = "tests/workers/relay/test_gaps.py"
HELD = "tests/workers/relay/test_held_writers.py"
RELAY = "tests/workers/relay/test_relay.py"
BROKER = "tests/workers/test_broker.py"
CONSUME = "tests/workers/test_consume.py"
RELEASING = "tests/workers/test_releasing.py"
ANY_ORDER = "tests/workers/test_consuming_in_any_order.py"
REPLAYING = "tests/workers/relay/test_replaying.py"
REPLAYS = "tests/workers/relay/test_replay_machine.py"
WRITING = "tests/domain/test_unit_of_work.py"
RETENTION = "tests/workers/test_retention.py"
ENVELOPE = "tests/workers/test_envelope.py"
POISON = "tests/flows/test_poison.py"
SUSPECTS = "tests/workers/test_suspects.py"
METRICS = "tests/workers/telemetry/test_metrics.py"
TOLD = "tests/workers/telemetry/test_what_is_told.py"
SURVEY = "tests/workers/telemetry/test_survey.py"
HEALTH = "tests/workers/telemetry/test_health.py"
SERVING = "tests/workers/telemetry/test_serving.py"
WATCHED = "tests/workers/telemetry/test_a_system_that_is_watched.py"
TAKING_OVER = "tests/flows/test_taking_over.py"
PAUSING = "tests/workers/test_pausing.py"

OUTBOX_SQL = "migrations/sql/0002_outbox.up.sql"
READING_SQL = "migrations/sql/0019_reading.up.sql"
BLOCKER_SQL = "migrations/sql/0013_blocker.up.sql"
RELEASING_SQL = "migrations/sql/0020_releasing.up.sql"
RETENTION_SQL = "migrations/sql/0008_retention.up.sql"


@dataclass(frozen=True)
class Mutant:
    """One protecting line, broken."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # Writing ------------------------------------------------------------------------------------
    Mutant(
        "no floor is announced",
        READING_SQL,
        "if not pg_try_advisory_xact_lock_shared(\n                dovecote.floor_key(",
        "if false and not pg_try_advisory_xact_lock_shared(\n                dovecote.floor_key(",
        READING,
    ),
    Mutant(
        "the floor is announced after the position",
        OUTBOX_SQL,
        "create trigger announce before insert",
        "create trigger announce after insert",
        READING,
    ),
    Mutant(
        "the floor is that of the highest position, not of one's own",
        READING_SQL,
        "coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0)",
        "coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0) + 1",
        READING,
    ),
    Mutant(
        "a transaction announces itself once in a session's life",
        READING_SQL,
        "if current_setting('dovecote.announced', true) is distinct from pg_current_xact_id()::text then",
        "if current_setting('dovecote.announced', true) is null then",
        READING,
    ),
    Mutant(
        "the sequence hands out blocks of positions",
        OUTBOX_SQL,
        "create sequence dovecote.outbox_position as bigint cache 1;",
        "create sequence dovecote.outbox_position as bigint cache 20;",
        READING,
    ),
    Mutant(
        "nobody rings the bell",
        READING_SQL,
        "perform pg_notify('dovecote_outbox', '');",
        "null;",
        f"{WRITING} {RELAY}",
    ),
    Mutant(
        "events get their positions before the aggregate's row is locked",
        "domain/unit_of_work.py",
        "        session.flush()\n        outbox.append(",
        "        outbox.append(",
        WRITING,
    ),
    Mutant(
        "a savepoint rolled back keeps the facts told inside it",
        "domain/unit_of_work.py",
        "[fact for fact in self._facts if not _within(fact.emitted_in, rolled_back)]",
        "list(self._facts)",
        WRITING,
    ),
    Mutant(
        "what was written inside a savepoint rolled back is not written again",
        "domain/unit_of_work.py",
        "            if _within(fact.written_in, rolled_back):\n",
        "            if False:\n",
        WRITING,
    ),
    Mutant(
        "facts outlive the transaction they were told in",
        "domain/unit_of_work.py",
        "            self._facts.clear()",
        "            pass",
        WRITING,
    ),
    Mutant(
        "a writer may go round the trigger into a partition",
        OUTBOX_SQL,
        "    on dovecote.outbox to dovecote_writer, dovecote_worker;\n",
        "    on dovecote.outbox, dovecote.outbox_default to dovecote_writer, dovecote_worker;\n",
        WRITING,
    ),
    # Reading ------------------------------------------------------------------------------------
    Mutant(
        "floors are not asked for",
        READING_SQL,
        "least(last_position, min(holder.floor))",
        "last_position",
        READING,
    ),
    Mutant(
        "the checkpoint goes to the frontier",
        "workers/relay/reading.py",
        "self.checkpoint = max(self.checkpoint, min(settled, frontier))",
        "self.checkpoint = max(self.checkpoint, frontier)",
        READING,
    ),
    Mutant(
        "a hole that is settled is kept for ever",
        "workers/relay/reading.py",
        "above([*still_missing, *holes(self.frontier, frontier, positions(beyond))], settled)",
        "[*still_missing, *holes(self.frontier, frontier, positions(beyond))]",
        READING,
    ),
    Mutant(
        "holes are not looked into",
        "workers/relay/reading.py",
        "        if not self._holes:\n            return []",
        "        if True:\n            return []",
        READING,
    ),
    Mutant(
        "a new reader forgets the holes above the checkpoint",
        "workers/relay/reading.py",
        "                self._holes += holes(self.frontier, stop - 1, range(max(start, self.frontier + 1), stop))\n",
        "",
        READING,
    ),
    Mutant(
        "late rows are asked for before those beyond",
        "workers/relay/reading.py",
        "        beyond = self._rows(_BEYOND, self.frontier, self._batch_size)\n",
        "        early = self._late()\n        beyond = self._rows(_BEYOND, self.frontier, self._batch_size)\n"
        "        self._late = lambda: early  # type: ignore[method-assign]\n",
        READING,
    ),
    Mutant(
        "a batch cut short leaves out what it did not take",
        "workers/relay/reading.py",
        "        if len(beyond) == self._batch_size:\n",
        "        if False:\n",
        READING,
    ),
    Mutant(
        "gaps are looked into in every read",
        "workers/relay/reading.py",
        "        return floor if ended is None else ended\n",
        "        return 0\n",
        GAPS,
    ),
    Mutant(
        "a gap above the sequence is not looked into for its own sake",
        "workers/relay/reading.py",
        "        self._unseen_above = last_position\n",
        "        self._unseen_above = frontier\n",
        GAPS,
    ),
    Mutant(
        "who is over is not asked again when late rows were found",
        "workers/relay/reading.py",
        "if not late or (ended := self._lowest_floor_of_ended(floor)) >= floor:",
        "if True:",
        GAPS,
    ),
    Mutant(
        "the rest of a full batch of late rows is left",
        "workers/relay/reading.py",
        "        self._unseen_above = 0  # the rest is there already, whoever is over next\n",
        "",
        GAPS,
    ),
    Mutant(
        "rows beyond go along with late ones whatever they follow on",
        "workers/relay/reading.py",
        "        beyond = [row for row in beyond if row[0] not in behind]\n",
        "",
        GAPS,
    ),
    Mutant(
        "rows beyond wait until all late ones are read",
        "workers/relay/reading.py",
        "            return self._late_first(late, beyond)\n",
        "            return self._late_first(late, [])\n",
        GAPS,
    ),
    Mutant(
        "a writer that ended between two looks is forgotten",
        "workers/relay/gaps.py",
        "known = self._before | self._now",
        "known = self._now",
        READING,
    ),
    Mutant(
        "the locks say who is over",
        "workers/relay/gaps.py",
        "where xid is null or pg_visible_in_snapshot(xid::text::xid8, pg_current_snapshot())",
        "where not exists (select from pg_locks where transactionid::text::bigint = writer.xid)"
        " and not exists (select from pg_locks where locktype = 'advisory' and classid::bigint >> 16 = 17602)",
        GAPS,
    ),
    Mutant(
        "one without a transaction is never over",
        "workers/relay/gaps.py",
        "where xid is null or pg_visible",
        "where pg_visible",
        GAPS,
    ),
    Mutant(
        "the highest number of a transaction is taken for it",
        READING_SQL,
        "min(now_xid + (((l.transactionid",
        "max(now_xid + (((l.transactionid",
        GAPS,
    ),
    # Publishing ---------------------------------------------------------------------------------
    Mutant(
        "a batch is recorded and not sent",
        "workers/relay/leading.py",
        "            self._send(self._bundler.bundles(batch.rows))\n            if not",
        "            if not",
        RELAY,
    ),
    Mutant(
        "an old epoch may record",
        "workers/relay/leading.py",
        "from dovecote.relay_state where epoch = %(epoch)s for no key update",
        "from dovecote.relay_state where epoch > 0 for no key update",
        RELAY,
    ),
    Mutant(
        "an old epoch goes on although its record was refused",
        "workers/relay/leading.py",
        "        if rows_changed != 1:\n",
        "        if False:\n",
        RELAY,
    ),
    Mutant(
        "an old epoch may publish",
        "workers/lua/publish.lua",
        "if epoch > tonumber(ARGV[1]) then",
        "if false then",
        f"{BROKER} {RELAY}",
    ),
    Mutant(
        "an empty Redis is published to as if it knew us",
        "workers/lua/publish.lua",
        "if epoch < tonumber(ARGV[1]) then",
        "if false then",
        f"{BROKER} {RELAY}",
    ),
    Mutant(
        "an older relay takes the marker back",
        "workers/lua/claim_epoch.lua",
        "if found <= tonumber(ARGV[1]) and",
        "if",
        f"{BROKER} {RELAY}",
    ),
    Mutant(
        "the marker is not compared where it is claimed",
        "workers/lua/claim_epoch.lua",
        "and (not ARGV[2] or found == tonumber(ARGV[2])) then",
        "then",
        f"{BROKER} {RELAY}",
    ),
    Mutant(
        "a message is queued again while it is queued",
        "workers/lua/publish.lua",
        "if redis.call('hsetnx', ARGV[i] .. '.msgs', ARGV[i + 1], ARGV[i + 2]) == 1 then",
        "if redis.call('hset', ARGV[i] .. '.msgs', ARGV[i + 1], ARGV[i + 2]) >= 0 then",
        BROKER,
    ),
    Mutant(
        "nobody looks whether Redis is the one we knew",
        "workers/relay/leading.py",
        "        self._through_outages(self._check_redis)\n",
        "",
        RELAY,
    ),
    Mutant(
        "what Redis lost is not sent again",
        "workers/relay/leading.py",
        "sent = sum(self._broker.publish(self._epoch, bundles) for bundles in found if bundles)",
        "sent = sum(0 for bundles in found if bundles)",
        RELAY,
    ),
    Mutant(
        "a Redis is known before what it lost is sent again",
        "workers/relay/leading.py",
        "            self._know_redis(None)\n",
        "            self._know_redis(known_redis(run_id, self._epoch))\n",
        RELAY,
    ),
    Mutant(
        "a relay that leads is not alone",
        "workers/relay/relay.py",
        "            if locked:\n",
        "            if True:\n",
        RELAY,
    ),
    Mutant(
        "the relay sleeps without a last look",
        "workers/relay/leading.py",
        "            self._sleeper.sleep(self._pause_seconds)\n",
        "            self._sleeper.sleep(self._pause_seconds)\n"
        "        else:\n            self._sleeper.sleep(self._settings.poll_seconds, self._connection)\n",
        RELAY,
    ),
    Mutant(
        "the relay forgets who was at work when it fell asleep",
        "workers/relay/leading.py",
        "        if not self._silent_writers:\n",
        "        if True:\n",
        HELD,
    ),
    Mutant(
        "the relay takes an older look for who was at work when it fell asleep",
        "workers/relay/leading.py",
        "        if self._holds_bell and not called:\n",
        "        if False:\n",
        HELD,
    ),
    Mutant(
        "a writer that is held keeps the relay busy",
        "workers/relay/leading.py",
        "max(soon, taken * _SHARE_OF_A_TRANSACTION)",
        "soon",
        HELD,
    ),
    Mutant(
        "a silent writer that is over is waited for",
        "workers/relay/leading.py",
        "self._silent_writers & at_work",
        "self._silent_writers",
        HELD,
    ),
    Mutant(
        "a writer keeps the bell until its end",
        READING_SQL,
        "(case when pg_try_advisory_lock_shared(dovecote.bell_key())\n"
        "                 then not pg_advisory_unlock_shared(dovecote.bell_key()) else true end)",
        "not pg_try_advisory_xact_lock_shared(dovecote.bell_key())",
        HELD,
    ),
    Mutant(
        "each batch writes the checkpoint",
        "workers/relay/leading.py",
        "        self._unrouted.meet(batch.rows)\n",
        "        self._unrouted.meet(batch.rows)\n        self.checkpoint = batch.checkpoint\n"
        "        self._record_checkpoint()\n",
        HELD,
    ),
    Mutant(
        "the checkpoint is written every second",
        "workers/relay/leading.py",
        "        if self.checkpoint > self._recorded_checkpoint:\n",
        "        if True:\n",
        HELD,
    ),
    Mutant(
        "each batch writes what it met that is not routed",
        "workers/relay/unrouted.py",
        "not self._met.keys() <= self._written",
        "bool(self._met)",
        HELD,
    ),
    Mutant(
        "a writer need not ring once the relay has slept",
        "workers/relay/leading.py",
        '            self._connection.execute("select pg_advisory_unlock(dovecote.bell_key())")\n',
        "",
        f"{RELAY} tests/test_benchmarks.py",
    ),
    Mutant(
        "the relay waits for a worker that holds a retry",
        "workers/relay/leases.py",
        "skip locked\n    )\n    update dovecote.deliveries d set next_attempt_at = now()\n    from leased",
        "\n    )\n    update dovecote.deliveries d set next_attempt_at = now()\n    from leased",
        f"{RELAY}::test_a_relay_waits_for_no_worker_that_holds_a_delivery",
    ),
    Mutant(
        "a retry that was sent is forgotten",
        "workers/relay/leases.py",
        " next_attempt_at = now() + make_interval(secs => %(lease_seconds)s)",
        " next_attempt_at = now() + interval '1 year'",
        RELAY,
    ),
    # Consuming ----------------------------------------------------------------------------------
    Mutant(
        "a handler acts before it is marked",
        "workers/consume.py",
        "        fresh = uow.once(route.handler, envelopes)\n",
        "        fresh = list(envelopes)\n",
        CONSUME,
    ),
    Mutant(
        "a mark that is there is an error",
        "domain/processed_events.py",
        "    on conflict do nothing\n",
        "",
        CONSUME,
    ),
    Mutant(
        "bundles that overlap mark in any order",
        "domain/processed_events.py",
        "from bundle order by event_id\n",
        "from bundle order by md5(random()::text)\n",
        CONSUME,
    ),
    Mutant(
        "a bundle that failed is given up as a whole",
        "workers/consume.py",
        "error = failure if alone else self._through_outages(route, [envelope], retry, replay)",
        "error = failure",
        CONSUME,
    ),
    Mutant(
        "a failure that cannot be recorded is acknowledged",
        "workers/consume.py",
        "        state = self._held(write)\n",
        "        try:\n            state = write()\n        except Exception:\n            state = 'lost'\n",
        CONSUME,
    ),
    Mutant(
        "trouble that passes spends an attempt",
        "workers/consume.py",
        "                    if passes(error):\n",
        "                    if False:\n",
        CONSUME,
    ),
    Mutant(
        "a redelivered bundle takes up what failed, before its time",
        "workers/consume.py",
        "found = deliveries.not_yet_failed(session, route, envelopes)",
        "found = list(envelopes)",
        CONSUME,
    ),
    Mutant(
        "a retry takes up what is no longer due",
        "workers/consume.py",
        "found = deliveries.still_due(session, route, envelopes, replay)",
        "found = list(envelopes)",
        CONSUME,
    ),
    Mutant(
        "two workers with one retry do not wait for each other",
        "workers/deliveries.py",
        "where handler_name = :handler_name)\n    for update\n",
        "where handler_name = :handler_name)\n",
        CONSUME,
    ),
    Mutant(
        "what was discarded fails back to life",
        "workers/deliveries.py",
        "        where known.state <> 'discarded'\n",
        "",
        CONSUME,
    ),
    Mutant(
        "an ordered handler asks for no predecessor",
        "workers/consume.py",
        "        if route.ordered and envelopes:\n",
        "        if False:\n",
        CONSUME,
    ),
    Mutant(
        "an event goes although the one before it in its bundle must wait",
        "workers/deliveries.py",
        "if before is not None and (before.blocker not in here or before.blocker in waiting):",
        "if before is not None and before.blocker not in here:",
        CONSUME,
    ),
    Mutant(
        "an event is parked while the one before it is just being done",
        "workers/consume.py",
        "        while found.at_work is not None and self",
        "        while False and self",
        CONSUME,
    ),
    Mutant(
        "what waits is not sent on by the one it waited for",
        "workers/consume.py",
        "            deliveries.release_next(session, route, done, replay)\n",
        "            pass\n",
        CONSUME,
    ),
    Mutant(
        "an event parked while the one before it commits is left to the relay",
        "workers/consume.py",
        "            self._held(partial(self._release_parked, route, parked))\n",
        "            pass\n",
        f"{RELEASING}::test_an_event_parked_during_the_commit_of_the_one_before_it_goes_on_at_once",
    ),
    Mutant(
        "who parks does not wait for the commit of the one before",
        RELEASING_SQL,
        "while not pg_catalog.pg_try_advisory_xact_lock(",
        "while false and not pg_catalog.pg_try_advisory_xact_lock(",
        f"{RELEASING}::test_an_event_parked_during_the_commit_of_the_one_before_it_goes_on_at_once",
    ),
    Mutant(
        "one that failed takes along what waits behind it",
        RELEASING_SQL,
        "continue when due.attempts > 0 or due.error is not null or",
        "continue when",
        RELEASING,
    ),
    Mutant(
        "one that was released goes alone",
        RELEASING_SQL,
        "continue when behind is null or behind < 1;",
        "continue;",
        RELEASING,
    ),
    Mutant(
        "a lease that was lost takes more along",
        RELEASING_SQL,
        "or due.error is not null or due.leased_until is not null;",
        "or due.error is not null;",
        RELEASING,
    ),
    Mutant(
        "a bundle of released events is as large as they are",
        RELEASING_SQL,
        "exit when coalesce(size, 0) > of_bundle;",
        "",
        RELEASING,
    ),
    Mutant(
        "more may be due than one lease returns, and nobody asks",
        "workers/relay/leading.py",
        '            self._heard.add("dovecote_deliveries")\n',
        "            pass\n",
        RELEASING,
    ),
    Mutant(
        "an event is released although the one before it is not done",
        RELEASING_SQL,
        "d.aggregate_type, d.aggregate_id, d.position) is null",
        "d.aggregate_type, d.aggregate_id, d.position) is null or true",
        RELEASING,
    ),
    Mutant(
        "strays wait for ever",
        "workers/relay/leading.py",
        "            leases.release_strays(self._connection, route, self._cursors[route.handler])\n",
        "                pass\n",
        RELAY,
    ),
    Mutant(
        "a discarded event blocks its aggregate",
        RELEASING_SQL,
        "is distinct from 'discarded'",
        "is distinct from 'nothing'",
        CONSUME,
    ),
    Mutant(
        "an attempt counts for nothing",
        "workers/deliveries.py",
        "attempts = so_far.attempts + 1",
        "attempts = so_far.attempts or 1",
        CONSUME,
    ),
    Mutant(
        "a failure is counted again when its record is written again",
        "workers/consume.py",
        "so_far = so_far or deliveries.so_far(session, route, envelope)",
        "so_far = deliveries.so_far(session, route, envelope)",
        f"{CONSUME}::test_a_failure_whose_record_was_committed_without_a_reply_counts_once",
    ),
    Mutant(
        "a server that only the handler asks is waited for",
        "workers/consume.py",
        "if answers <= _MOST_ANSWERS:",
        "if True:",
        f"{CONSUME}::test_a_server_that_is_away_for_the_handler_alone_holds_up_no_other_event",
    ),
    Mutant(
        "what a frozen worker has locked is a failure of others",
        "workers/bootstrap.py",
        "        lock_timeout=settings.database.statement_timeout_ms // 2,\n",
        "",
        f"{CONSUME}::test_what_a_frozen_worker_has_locked_is_waited_for_and_spends_no_attempt",
    ),
    Mutant(
        "a bundle that says nothing to Postgres loses its session",
        "workers/consume.py",
        "                    uow.session.execute(_say_something)\n",
        "                    pass\n",
        f"{CONSUME}::test_a_long_bundle_that_has_nothing_to_say_to_postgres_is_not_taken_for_frozen",
    ),
    Mutant(
        "a provider that is away spends attempts",
        "workers/deliveries.py",
        "    if isinstance(error, GatewayUnavailable | UnknownEvent | UnknownHandler) or passes(error):\n",
        "    if False:\n",
        CONSUME,
    ),
    # What kills or hangs ------------------------------------------------------------------------
    Mutant(
        "crashes are not counted",
        "workers/lua/reap.lua",
        "redis.call('hset', KEYS[1] .. '.msgs', ids[i], with_one_crash_more(message, ids[i]))",
        "redis.call('hset', KEYS[1] .. '.msgs', ids[i], message)",
        BROKER,
    ),
    Mutant(
        "a second crash counts for nothing",
        "workers/lua/reap.lua",
        "(crashes + 1)",
        "crashes",
        BROKER,
    ),
    Mutant(
        "nothing is marked before it starts",
        "workers/consume.py",
        "            with self._marked(suspect, envelopes):\n",
        "            with self._marked(None, envelopes):\n",
        f"{POISON}::test_an_event_that_kills_its_process_is_dead_after_three_starts_and_its_mates_go_through",
    ),
    Mutant(
        "a mark outlives what it marks",
        "workers/consume.py",
        "            self._held(partial(suspect.write, after))\n",
        "            pass\n",
        SUSPECTS,
    ),
    Mutant(
        "suspects are at work beside each other",
        "workers/suspects.py",
        "    while not _one_at_a_time.acquire(timeout=0.2):\n        give_up()\n    try:\n        yield\n"
        "    finally:\n        _one_at_a_time.release()\n",
        "    yield\n",
        SUSPECTS,
    ),
    Mutant(
        "an event is started for ever",
        "workers/consume.py",
        "                if starts >= MOST_STARTS:\n",
        "                if False:\n",
        SUSPECTS,
    ),
    Mutant(
        "crashes that are explained speak against others",
        "workers/suspects.py",
        "self.crashes - marks.explained > known",
        "self.crashes > known",
        SUSPECTS,
    ),
    Mutant(
        "a mark outlives a clean return",
        "workers/lua/hand_back.lua",
        "        redis.call('hdel', KEYS[2] .. '.at_work', ARGV[i])\n",
        "",
        BROKER,
    ),
    Mutant(
        "an event that is found again on record is buried again",
        "workers/consume.py",
        "        if self._held(partial(self._is_open, route, envelope, retry, replay)):\n",
        "        if True:\n",
        SUSPECTS,
    ),
    Mutant(
        "a handler that swallows its being cut off has succeeded",
        "workers/time_limits.py",
        "        if watch.was_cut_off:\n            raise exceeded(watch)",
        "        if watch.was_cut_off and cut_off:\n            raise exceeded(watch)",
        CONSUME,
    ),
    Mutant(
        "the time limit is for the bundle",
        "workers/time_limits.py",
        "        self.deadline = self.began_at + self.seconds\n\n    def cut_off",
        "\n    def cut_off",
        f"{CONSUME}::test_the_limit_is_for_each_event_of_a_bundle",
    ),
    Mutant(
        "a stuck process does not end",
        "workers/consume.py",
        "        os._exit(_STUCK_EXIT_CODE)\n",
        "        threading.Event().wait()\n",
        f"{POISON}::test_a_handler_that_hangs_in_c_ends_its_process_and_its_mates_go_through",
    ),
    Mutant(
        "a stuck process says nothing when it ends",
        "workers/consume.py",
        "            deliveries.record_failure(session, watch.route, envelope, error, failure, so_far, watch.replay)\n",
        "            pass\n",
        f"{POISON}::test_a_handler_that_hangs_in_c_ends_its_process_and_its_mates_go_through",
    ),
    # The broker ---------------------------------------------------------------------------------
    Mutant(
        "nobody reaps the dead",
        "workers/broker.py",
        "                for name in (queue, dq_name(queue)):\n                    self._reap(",
        "                for name in ():\n                    self._reap(",
        BROKER,
    ),
    Mutant(
        "the relay does not reap",
        "workers/relay/leading.py",
        "            self._through_outages(lambda: self._meters.reaped(self._broker.reap()))\n",
        "            pass\n",
        TAKING_OVER,
    ),
    Mutant(
        "messages are handed back in reverse",
        "workers/lua/hand_back.lua",
        "for i = #ARGV, 1, -1 do",
        "for i = 1, #ARGV do",
        BROKER,
    ),
    Mutant(
        "messages are handed back to the tail",
        "workers/lua/hand_back.lua",
        "redis.call('lpush', KEYS[2], ARGV[i])",
        "redis.call('rpush', KEYS[2], ARGV[i])",
        BROKER,
    ),
    Mutant(
        "what a lost reply held is not asked for",
        "workers/fetching.py",
        "                self.broker.reclaim(self.queue_name)\n",
        "",
        BROKER,
    ),
    Mutant(
        "a message that failed is acknowledged",
        "workers/handing_back.py",
        "            self._stopping.wait(self._pause_seconds)\n            hand_back(message)\n",
        "            self._stopping.wait(self._pause_seconds)\n",
        BROKER,
    ),
    Mutant(
        "a message that cannot be read comes back for ever",
        "workers/fetching.py",
        "        if unreadable:\n            self.broker.bury_unreadable(self.queue_name)\n",
        "",
        BROKER,
    ),
    Mutant(
        "one payload that cannot be read takes its bundle along",
        "workers/envelope.py",
        "        if not envelopes:\n            raise\n",
        "        raise\n",
        ENVELOPE,
    ),
    Mutant(
        "one header that cannot be read takes its bundle along",
        "workers/envelope.py",
        '_first_readable(attributes + b"}", without_headers + b"}")',
        '_first_readable(attributes + b"}", attributes + b"}")',
        ENVELOPE,
    ),
    Mutant(
        "what is for a handler of other code is a dead letter of Dramatiq's",
        "workers/bootstrap.py",
        "        broker.stand_in = stand_in\n",
        "        pass\n",
        "tests/workers/relay/test_routing.py::test_a_consumer_keeps_what_is_for_a_handler_that_only_other_code_has",
    ),
    # Retention ----------------------------------------------------------------------------------
    Mutant(
        "a week that is needed is dropped all the same",
        RETENTION_SQL,
        "        raise exception 'week % is still needed: %', week, in_the_way using errcode = 'object_in_use';\n",
        "        raise notice 'week % is still needed: %', week, in_the_way;\n",
        RETENTION,
    ),
    Mutant(
        "a dropped week takes events again",
        RETENTION_SQL,
        "        raise exception 'the outbox refuses the event: id % is of %, a week that was dropped;",
        "        raise notice 'the outbox refuses the event: id % is of %, a week that was dropped;",
        RETENTION,
    ),
    # Replaying ----------------------------------------------------------------------------------
    Mutant(
        "a replay acts again on what it has acted on",
        "domain/processed_events.py",
        "          and replay_id is distinct from :replay_id\n",
        "",
        REPLAYS,
    ),
    Mutant(
        "a cancelled replay acts on",
        "domain/processed_events.py",
        "where id = :replay_id and state <> 'cancelled' and",
        "where id = :replay_id and",
        REPLAYS,
    ),
    Mutant(
        "an aggregate's events of one wave are in several bundles",
        "workers/relay/replaying.py",
        "parts = by_aggregate(events, run.route.bundle_size)",
        "parts = in_order(events, run.route.bundle_size)",
        REPLAYS,
    ),
    Mutant(
        "nothing waits for what failed in its replay",
        "workers/deliveries.py",
        "and d.position < bundle.position and d.state <> 'discarded'",
        "and false",
        REPLAYS,
    ),
    Mutant(
        "a replay queues again what is still queued",
        "workers/relay/replaying.py",
        "parts = in_order(self._without_queued(run.route, events), run.route.bundle_size)",
        "parts = in_order(events, run.route.bundle_size)",
        f"{REPLAYING}::test_what_is_still_queued_is_not_queued_again",
    ),
    Mutant(
        "a replay goes on while its handler is paused",
        "workers/relay/replaying.py",
        "      and not exists (select from dovecote.paused_handlers h where h.handler_name = r.handler_name)\n",
        "",
        f"{REPLAYING}::test_a_replay_waits_while_its_handler_is_paused",
    ),
    # Pausing ------------------------------------------------------------------------------------
    Mutant(
        "a paused handler acts on new events",
        "workers/deliveries.py",
        "          and not exists (select from dovecote.paused_handlers where handler_name = %(handler_name)s)\n",
        "",
        PAUSING,
    ),
    Mutant(
        "a paused ordered handler acts on new events",
        "workers/deliveries.py",
        "    union all\n    select unnest(cast(:event_ids as uuid[])) from dovecote.paused_handlers"
        " where handler_name = :handler_name\n",
        "",
        PAUSING,
    ),
    Mutant(
        "a paused handler is taken for one with nothing to do",
        "workers/pauses.py",
        "        raise HandlerPaused(handler_name)\n",
        "        pass\n",
        PAUSING,
    ),
    Mutant(
        "what was put aside comes back newest first",
        "workers/lua/take_back.lua",
        "'RIGHT', 'LEFT'",
        "'LEFT', 'LEFT'",
        PAUSING,
    ),
    Mutant(
        "what is put aside after the resume stays aside",
        "workers/relay/leading.py",
        "reaped(self._broker.reap()))\n            self._through_outages(self._take_back)\n",
        "reaped(self._broker.reap()))\n",
        PAUSING,
    ),
    # Watching -----------------------------------------------------------------------------------
    Mutant(
        "a bundle that ended is at work",
        "workers/telemetry/metrics.py",
        "            del self._began[thread]\n",
        "            pass\n",
        METRICS,
    ),
    Mutant(
        "a lively thread hides one that is silent",
        "workers/telemetry/metrics.py",
        "min(list(self._fetched.values()))",
        "max(list(self._fetched.values()))",
        METRICS,
    ),
    Mutant(
        "a value on a bound is counted above it",
        "workers/telemetry/metrics.py",
        "bisect_right(ordered, bound, below)",
        "bisect_right(ordered, bound - 1e-9, below)",
        METRICS,
    ),
    Mutant(
        "a worker that is gone is alive",
        "workers/telemetry/metrics.py",
        "        if started_at(pid) is None:\n",
        "        if False:\n",
        METRICS,
    ),
    Mutant(
        "a replay is an effect of now",
        "workers/telemetry/metrics.py",
        "        if not again:",
        "        if True:",
        METRICS,
    ),
    Mutant(
        "effects are not counted",
        "workers/consume.py",
        "            self.meters.acted(route.handler, acted, again=replay is not None)\n",
        "",
        TOLD,
    ),
    Mutant(
        "calls of an ordinary handler are one",
        "workers/time_limits.py",
        "        self.moments.append(self.began_at)\n",
        "        self.moments[:] = self.moments[:1] or [self.began_at]\n",
        TOLD,
    ),
    Mutant(
        "rings are not counted",
        "workers/relay/leading.py",
        "                self._meters.rang()\n",
        "                pass\n",
        WATCHED,
    ),
    Mutant(
        "waiting for Redis looks like leading",
        "workers/relay/leading.py",
        '                self._meters.alive("waiting_for_redis")\n',
        "",
        TOLD,
    ),
    Mutant(
        "a server that is away fails the scrape",
        "workers/telemetry/survey.py",
        "        except redis.RedisError:\n",
        "        except ZeroDivisionError:\n",
        SURVEY,
    ),
    Mutant(
        "every scrape asks Postgres",
        "workers/telemetry/survey.py",
        "time.monotonic() - self._found_at >= _KEPT_SECONDS",
        "True",
        SURVEY,
    ),
    Mutant(
        "a check that hangs is begun again",
        "workers/telemetry/health.py",
        "if not is_asking and time",
        "if time",
        HEALTH,
    ),
    Mutant(
        "health forgets since when",
        "workers/telemetry/health.py",
        "            if status != self._status:\n",
        "            if True:\n",
        HEALTH,
    ),
    Mutant(
        "a taken port is given up",
        "workers/telemetry/serving.py",
        "            continue\n",
        "            return\n",
        SERVING,
    ),
)
