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
        DELIVERIES,
    ),
    Mutant(
        "what is sent again is cut anew",
        "dovecote/relay/bundler.py",
        "key = delivery.handler_name, delivery.replay_id, delivery.first_leased_at",
        "key = delivery.handler_name, delivery.replay_id, 0",
        DELIVERIES,
    ),
    Mutant(
        "a lease that is over is forgotten",
        LEASES,
        "coalesce(case when next_attempt_at = leased_until and first_leased_at between 'epoch' and now()\n"
        "                             then first_leased_at end, now())",
        "now()",
        DELIVERIES,
    ),
    Mutant(
        "a lease that is ended is none",
        LEASES,
        "set next_attempt_at = now(), leased_until = now()\n",
        "set next_attempt_at = now()\n",
        DELIVERIES,
    ),
    Mutant(
        "what is queued for long is leased again and again",
        LEASES,
        "least(greatest(now() - first_leased_at, make_interval(secs => %(lease_seconds)s)),",
        "least(make_interval(secs => %(lease_seconds)s),",
        DELIVERIES,
    ),
    Mutant(
        "a delivery whose event is gone is leased for ever",
        LEASES,
        "        dead_letter_gone(connection, routes, [",
        "        (lambda *_: None)(connection, routes, [",
        DELIVERIES,
    ),
    Mutant(
        "what waits behind an event that is gone goes on waiting",
        "dovecote/store/unsendable.py",
        "            connection.execute(_RELEASE_NEXT, behind)\n",
        "            del behind\n",
        DELIVERIES,
    ),
    # Queues -------------------------------------------------------------------------------------
    Mutant(
        "nobody looks for queues that were renamed",
        "dovecote/relay/renamed_queues.py",
        "            work = self._look()\n",
        "            return\n",
        RENAMED,
    ),
    Mutant(
        "a dead worker keeps what it held of an old queue",
        "dovecote/relay/renamed_queues.py",
        "                self._broker.reap(names[start : start + _REAPED_QUEUES])\n",
        "                pass\n",
        RENAMED,
    ),
    Mutant(
        "a relay that was replaced moves messages", MOVE, "if epoch > tonumber(ARGV[1]) then", "if false then", RENAMED
    ),
    Mutant("messages are moved in a Redis that forgot", MOVE, "if epoch < tonumber(ARGV[1])", "if false", RENAMED),
    Mutant("a message that is there already is queued twice", MOVE, "message) == 1", "message) >= 0", RENAMED),
    Mutant(
        "what is older goes behind what is newer",
        MOVE,
        "redis.call(from_end and 'lpush' or 'rpush', ",
        "redis.call('rpush', ",
        RENAMED,
    ),
    Mutant(
        "a message that is moved is written anew",
        MOVE,
        ".msgs', id, message)",
        ".msgs', id, message .. ' ')",
        RENAMED,
    ),
    Mutant("a message is moved to where it is, and lost", MOVE, "(not to or to == from)", "not to", RENAMED),
    Mutant(
        "a moved message forgets whom it killed",
        MOVE,
        "                if kept_of_it then",
        "                if false then",
        RENAMED,
    ),
)
