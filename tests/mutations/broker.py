"""Mutants of the broker, retention and replays."""

from tests.mutations.mutant import Mutant

BROKER = "tests/dovecote/broker/test_broker.py"
REPLAYING = "tests/dovecote/relay/test_replayer.py"
RETENTION = "tests/dovecote/operations/test_retention.py"
ENVELOPE = "tests/dovecote/envelope/test_envelope.py"
TAKING_OVER = "tests/flows/test_taking_over.py"
RETENTION_SQL = "migrations/sql/0008_retention.up.sql"
FUNCTIONS_SQL = "migrations/sql/0027_functions.up.sql"

MUTANTS_OF_BROKER = (
    # The broker ---------------------------------------------------------------------------------
    Mutant(
        "nobody reaps the dead",
        "dovecote/broker/publisher.py",
        "            for name in names or [name for queue in self.queues for name in (queue, dq_name(queue))]:\n",
        "            for name in ():\n",
        f"{BROKER}::test_a_dead_worker_s_messages_are_requeued_and_a_living_one_s_are_not",
    ),
    Mutant(
        "the relay does not reap",
        "dovecote/relay/leader.py",
        "            self._retry_while_unavailable(self._reap)\n",
        "            pass\n",
        f"{TAKING_OVER}::test_what_a_killed_worker_had_in_hand_is_acted_on_within_15_seconds",
    ),
    Mutant(
        "messages are requeued in reverse",
        "dovecote/broker/lua/requeue.lua",
        "for i = #ARGV, 1, -1 do",
        "for i = 1, #ARGV do",
        f"{BROKER}::test_a_closed_consumer_gives_back_what_it_has_not_handed_out",
    ),
    Mutant(
        "messages are requeued at the tail",
        "dovecote/broker/lua/requeue.lua",
        "redis.call('lpush', KEYS[2], ARGV[i])",
        "redis.call('rpush', KEYS[2], ARGV[i])",
        f"{BROKER}::test_a_closed_consumer_gives_back_what_it_has_not_handed_out",
    ),
    Mutant(
        "what a lost reply held is not asked for",
        "dovecote/broker/fetcher.py",
        "                self.broker.reclaim(self.queue_name)\n",
        "",
        f"{BROKER}::test_messages_whose_fetch_reply_was_lost_are_found_again",
    ),
    Mutant(
        "a message that failed is acknowledged",
        "dovecote/consumer/middleware.py",
        "may_come_again(message.message_id):\n                set_to_requeue(message)\n",
        "may_come_again(message.message_id):\n                pass\n",
        f"{BROKER}::test_an_actor_that_raises_has_its_message_requeued",
    ),
    Mutant(
        "a message that cannot be read comes back for ever",
        "dovecote/broker/fetcher.py",
        "                self.broker.refuse(self.queue_name, one.id, refused)\n",
        "                del refused\n",
        f"{BROKER}::test_a_message_that_cannot_be_read_stops_no_other",
    ),
    Mutant(
        "one payload that cannot be read takes its bundle along",
        "dovecote/envelope/__init__.py",
        "    except ValueError:\n        pass\n    envelopes: list[Envelope] = []\n",
        "    except ValueError:\n        raise\n    envelopes: list[Envelope] = []\n",
        f"{ENVELOPE}::test_a_message_is_read_around_a_payload_that_cannot_be",
    ),
    Mutant(
        "one header that cannot be read takes its bundle along",
        "dovecote/envelope/__init__.py",
        '_first_readable(attributes + b"}", without_headers + b"}")',
        '_first_readable(attributes + b"}", attributes + b"}")',
        f"{ENVELOPE}::test_a_message_is_read_around_a_header_that_cannot_be",
    ),
    Mutant(
        "what is for a handler of other code is a dead letter of Dramatiq's",
        "dovecote/bootstrap.py",
        "            if queue not in broker.fallback_actors:\n",
        "            if False:\n",
        "tests/dovecote/relay/test_routing.py::test_a_consumer_keeps_what_is_for_a_handler_that_only_other_code_has",
    ),
    # Retention ----------------------------------------------------------------------------------
    Mutant(
        "a week that is needed is dropped all the same",
        "dovecote/migrations/sql/0010_retention.up.sql",
        "        raise exception 'week % is still needed: %', week, in_the_way using errcode = 'object_in_use';\n",
        "        raise notice 'week % is still needed: %', week, in_the_way;\n",
        f"{RETENTION}::test_nobody_drops_a_week_that_is_needed_or_young_by_calling_the_function",
    ),
    Mutant(
        "a dropped week takes events again",
        "dovecote/migrations/sql/0009_partitions.up.sql",
        "        raise exception 'the outbox refuses the event: id % is of %, a week that was dropped;",
        "        raise notice 'the outbox refuses the event: id % is of %, a week that was dropped;",
        f"{RETENTION}::test_an_event_of_a_dropped_week_is_refused_in_words",
    ),
    # Replaying ----------------------------------------------------------------------------------
    Mutant(
        "a replay acts again on what it has acted on",
        "dovecote/processed_events.py",
        "          and replay_id is distinct from :replay_id\n",
        "",
        "tests/dovecote/consumer/test_marks.py::test_a_message_of_a_replay_that_comes_twice_is_acted_on_once",
    ),
    Mutant(
        "a cancelled replay acts on",
        "dovecote/processed_events.py",
        "where id = :replay_id and state <> 'cancelled' and",
        "where id = :replay_id and",
        "tests/dovecote/consumer/test_marks.py::test_a_message_of_a_cancelled_replay_is_not_acted_on",
    ),
    Mutant(
        "an aggregate's events of one wave are in several bundles",
        "dovecote/relay/replayer.py",
        "parts = by_aggregate(events, run.route.bundle_size)",
        "parts = in_order(events, run.route.bundle_size)",
        "tests/dovecote/relay/test_waves.py::test_the_events_of_an_aggregate_in_one_wave_are_one_bundle",
    ),
    Mutant(
        "nothing waits for what failed in its replay",
        "dovecote/store/deliveries.py",
        "and d.position < bundle.position and d.state <> 'discarded'",
        "and false",
        "tests/dovecote/consumer/test_marks.py::test_what_follows_an_event_that_failed_in_a_replay_waits_for_it",
    ),
    Mutant(
        "a replay queues again what is still queued",
        "dovecote/relay/replayer.py",
        "parts = in_order(self._without_queued(run.route, events), run.route.bundle_size)",
        "parts = in_order(events, run.route.bundle_size)",
        f"{REPLAYING}::test_what_is_still_queued_is_not_queued_again",
    ),
    Mutant(
        "a replay goes on while its handler is paused",
        "dovecote/store/active_replays.py",
        "      and not exists (select from dovecote.paused_handlers h where h.handler_name = r.handler_name)\n",
        "",
        f"{REPLAYING}::test_a_replay_waits_while_its_handler_is_paused",
    ),
)
