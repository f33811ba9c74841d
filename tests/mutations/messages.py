"""Lines that keep what is in Redis from being believed."""

from tests.mutations.mutant import Mutant

MESSAGES = "tests/security/test_messages.py"
KEYS = "tests/security/test_redis_keys.py"
REFUSED = f"{MESSAGES}::test_a_message_that_no_relay_made_is_refused_once"
SIGNATURES, OPENING = "dovecote/envelope/signatures.py", "dovecote/envelope/message_reader.py"

SIGNED = (
    Mutant(
        "a signature is not compared",
        SIGNATURES,
        "return hmac.compare_digest(message[-TAIL_BYTES:], expected)",
        "return bool(expected)",
        f"{MESSAGES}::test_another_keys_signature_and_a_marks_are_none",
    ),
    Mutant(
        "a message without a signature is opened",
        OPENING,
        "        if key_id is None:\n",
        "        if False:\n",
        f"{MESSAGES}::test_a_message_that_no_relay_made_is_refused_once",
    ),
    Mutant(
        "a forged message is opened",
        OPENING,
        "        if not key.has_signed(data):\n",
        "        if False:\n",
        f"{MESSAGES}::test_a_message_that_no_relay_made_is_refused_once",
    ),
    Mutant(
        "a signed message is good on any queue",
        OPENING,
        "received.queue not in (contents.queue, its_queue) or contents.id",
        "contents.id",
        f"{MESSAGES}::test_a_signed_message_is_worth_nothing_under_another_id_or_on_another_queue",
    ),
    Mutant(
        "a signed message is good under any id",
        OPENING,
        " or contents.id != received.id",
        "",
        f"{MESSAGES}::test_a_message_that_no_relay_made_is_refused_once",
    ),
    Mutant(
        "what is for an unknown handler is given to Dramatiq unsigned",
        "dovecote/broker/broker.py",
        "        return actor not in others\n",
        "        return actor in self.signed_handlers\n",
        f"{MESSAGES}::test_a_message_that_no_relay_made_is_refused_once",
    ),
    Mutant(
        "crash counts are believed without a signature",
        "dovecote/store/poison.py",
        "return counts if key is not None and key.has_signed_crash_counts(self._message_id, counts, digest) else None",
        "return counts",
        f"{MESSAGES}::test_crash_counts_that_no_consumer_signed_for_this_message_count_as_none",
    ),
    Mutant(
        "crash counts are good for any message",
        SIGNATURES,
        'b"\\n".join((message_id.encode(), counts))',
        "counts",
        f"{MESSAGES}::test_crash_counts_that_no_consumer_signed_for_this_message_count_as_none",
    ),
    Mutant(
        "each made-up key id asks Postgres",
        SIGNATURES,
        "                if time.monotonic() - self._asked_at >= _ASK_AGAIN_SECONDS:\n",
        "                if True:\n",
        f"{MESSAGES}::test_made_up_key_ids_do_not_hammer_postgres",
    ),
    Mutant(
        "a line that is no envelope takes its bundle along",
        "dovecote/envelope/__init__.py",
        "            broken.append(Broken(",
        "            raise\n            broken.append(Broken(",
        f"{MESSAGES}::test_an_unreadable_line_takes_nobody_along",
    ),
    Mutant(
        "a message of another queue's name goes to Dramatiq",
        "dovecote/broker/fetcher.py",
        'message.queue_name != self.queue_name or message.options["redis_message_id"] != id',
        'message.options["redis_message_id"] != id',
        f"{MESSAGES}::test_another_programs_actor_on_our_queue_still_works_and_a_queue_of_nowhere_kills_no_thread",
    ),
    Mutant(
        "what fails time after time goes on for ever",
        "dovecote/consumer/middleware.py",
        "            if times > _MAX_REQUEUES:\n",
        "            if False:\n",
        f"{MESSAGES}::test_a_message_that_fails_time_after_time_is_refused_in_the_end",
    ),
    Mutant(
        "dead letters grow without an end",
        "dovecote/broker/lua/refuse.lua",
        "redis.call('zcard', KEYS[3]) < tonumber(ARGV[1])",
        "true",
        f"{MESSAGES}::test_a_flood_leaves_a_bounded_number_of_dead_letters",
    ),
    Mutant(
        "what was signed with a revoked key waits for the reconciler",
        "dovecote/envelope/signatures.py",
        "return not before.keys() <= self._keys.keys()",
        "return False",
        f"{MESSAGES}::test_a_relay_learns_once_that_a_key_was_revoked",
    ),
    Mutant(
        "a key of another type stays",
        "dovecote/broker/lua/mend.lua",
        "        redis.call('unlink', key)\n",
        "",
        f"{KEYS}::test_a_key_of_another_type_stops_nobody_for_long",
    ),
    Mutant(
        "a made-up epoch is believed",
        "dovecote/broker/lua/publish.lua",
        "if epoch > tonumber(ARGV[1]) + 1000000 then",
        "if false then",
        "tests/dovecote/broker/test_broker.py::test_an_epoch_that_somebody_has_made_up_is_a_lost_marker_and_no_newer_re"
        "l"
        "a"
        "y",
    ),
)
