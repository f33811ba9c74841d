"""Lines that protect what is left over: deliveries that nobody can send, and messages on queues of yesterday."""

from tests.mutations.mutant import Mutant
from tests.mutations.sql_files import ORDER_SQL

DELIVERIES = "tests/dovecote/relay/test_leftover_deliveries.py"
RENAMED = "tests/dovecote/relay/test_renamed_queues.py"

LEASES = "dovecote/store/leases.py"
MOVE = "dovecote/broker/lua/move.lua"

LEFTOVERS = (
    # Deliveries ---------------------------------------------------------------------------------
    Mutant(
        "one handler's many retries come before another's few",
        ORDER_SQL,
        "order by oldest.turn limit max_events",
        "order by oldest.handler_name limit max_events",
        f"{DELIVERIES}::test_one_handlers_many_retries_do_not_keep_anothers_few_waiting",
    ),
    Mutant(
        "what is sent again is cut anew",
        "dovecote/relay/bundler.py",
        "key = delivery.handler_name, delivery.replay_id, delivery.first_leased_at",
        "key = delivery.handler_name, delivery.replay_id, 0",
        f"{DELIVERIES}::test_what_is_sent_again_after_its_lease_goes_in_the_messages_it_went_in",
    ),
    Mutant(
        "a lease that is over is forgotten",
        LEASES,
        "coalesce(case when next_attempt_at = leased_until and first_leased_at between 'epoch' and now()\n"
        "                             then first_leased_at end, now())",
        "now()",
        f"{DELIVERIES}::test_a_lease_lasts_as_long_as_nothing_was_heard_of_the_message",
    ),
    Mutant(
        "a lease that is ended is none",
        LEASES,
        "set next_attempt_at = now(), leased_until = now()\n",
        "set next_attempt_at = now()\n",
        f"{DELIVERIES}::test_what_is_sent_again_after_its_lease_goes_in_the_messages_it_went_in",
    ),
    Mutant(
        "what is queued for long is leased again and again",
        LEASES,
        "least(greatest(now() - first_leased_at, make_interval(secs => %(lease_seconds)s)),",
        "least(make_interval(secs => %(lease_seconds)s),",
        f"{DELIVERIES}::test_a_lease_lasts_as_long_as_nothing_was_heard_of_the_message",
    ),
    Mutant(
        "a delivery whose event is gone is leased for ever",
        LEASES,
        "        dead_letter_gone(connection, routes, [",
        "        (lambda *_: None)(connection, routes, [",
        f"{DELIVERIES}::test_a_delivery_whose_event_is_gone_is_dead_and_says_so",
    ),
    Mutant(
        "what waits behind an event that is gone goes on waiting",
        "dovecote/store/unsendable.py",
        "            connection.execute(_RELEASE_NEXT, behind)\n",
        "            del behind\n",
        f"{DELIVERIES}::test_what_waits_behind_an_event_that_is_gone_goes_on_in_order[1]",
    ),
    # Queues -------------------------------------------------------------------------------------
    Mutant(
        "nobody looks for queues that were renamed",
        "dovecote/relay/renamed_queues.py",
        "            work = self._look()\n",
        "            return\n",
        f"{RENAMED}::test_a_deploy_that_renames_a_queue_strands_nothing",
    ),
    Mutant(
        "a dead worker keeps what it held of an old queue",
        "dovecote/relay/renamed_queues.py",
        "                self._broker.reap(names[start : start + _REAPED_QUEUES])\n",
        "                pass\n",
        f"{RENAMED}::test_what_a_dead_worker_held_of_the_old_queue_is_requeued_and_remembers_the_crash",
    ),
    Mutant(
        "a relay that was replaced moves messages",
        MOVE,
        "if epoch > tonumber(ARGV[1]) then",
        "if false then",
        f"{RENAMED}::test_only_the_newest_relay_moves_anything",
    ),
    Mutant(
        "messages are moved in a Redis that forgot",
        MOVE,
        "if epoch < tonumber(ARGV[1])",
        "if false",
        f"{RENAMED}::test_only_the_newest_relay_moves_anything",
    ),
    Mutant(
        "a message that is there already is queued twice",
        MOVE,
        "message) == 1",
        "message) >= 0",
        f"{RENAMED}::test_what_is_queued_goes_before_what_is_newer_and_once",
    ),
    Mutant(
        "what is older goes behind what is newer",
        MOVE,
        "redis.call(from_end and 'lpush' or 'rpush', ",
        "redis.call('rpush', ",
        f"{RENAMED}::test_what_is_queued_goes_before_what_is_newer_and_once",
    ),
    Mutant(
        "a message that is moved is written anew",
        MOVE,
        ".msgs', id, message)",
        ".msgs', id, message .. ' ')",
        f"{RENAMED}::test_what_no_route_has_and_what_is_not_ours_keeps_its_place",
    ),
    Mutant(
        "a message is moved to where it is, and lost",
        MOVE,
        "(not to or to == from)",
        "not to",
        f"{RENAMED}::test_of_two_handlers_on_a_queue_only_the_one_that_left_is_moved",
    ),
    Mutant(
        "a moved message forgets whom it killed",
        MOVE,
        "                if kept_of_it then",
        "                if false then",
        f"{RENAMED}::test_what_a_dead_worker_held_of_the_old_queue_is_requeued_and_remembers_the_crash",
    ),
)
