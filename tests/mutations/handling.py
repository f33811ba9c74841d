"""Mutants of handlers that kill, hang or are careless."""

from tests.mutations.mutant import Mutant

BROKER = "tests/dovecote/broker/test_broker.py"
CONSUME = "tests/dovecote/consumer/test_consumer.py"
POISON = "tests/flows/test_poison.py"
POISON_MESSAGES = "tests/dovecote/consumer/test_poison.py"
CARELESS = "tests/dovecote/consumer/test_careless_handlers.py"
ROUTES = "tests/dovecote/test_route.py"
BAD_EVENTS = "tests/dovecote/consumer/test_bad_events_in_bundles.py"

HANDLING = (
    # What kills or hangs ------------------------------------------------------------------------
    Mutant(
        "crashes are not counted",
        "dovecote/broker/lua/reap.lua",
        "redis.call('hset', crashes, ids[i], math.min(known or 0, 1000000) + 1)",
        "redis.call('hset', crashes, ids[i], known or 0)",
        f"{BROKER}::test_each_crash_is_counted_in_the_messages_of_the_dead_and_a_clean_return_is_not",
    ),
    Mutant(
        "a second crash counts for nothing",
        "dovecote/broker/lua/reap.lua",
        "redis.call('hget', crashes, ids[i]) or '0'",
        "'0'",
        f"{BROKER}::test_each_crash_is_counted_in_the_messages_of_the_dead_and_a_clean_return_is_not",
    ),
    Mutant(
        "no crash count is raised before an event is handled",
        "dovecote/consumer/consumer.py",
        "        with self._crash_count_raised(bundle):\n",
        "        with suppress():\n",
        f"{POISON}::test_an_event_that_kills_its_process_is_dead_after_three_starts_and_its_mates_go_through",
    ),
    Mutant(
        "a crash count stays raised when its event has ended",
        "dovecote/consumer/consumer.py",
        "            self._retry(partial(bundle.poison.write, after))\n",
        "            pass\n",
        f"{POISON_MESSAGES}::test_only_the_event_in_flight_is_counted",
    ),
    Mutant(
        "poison messages are handled beside each other",
        "dovecote/store/poison.py",
        "    while not _one_at_a_time.acquire(timeout=0.2):\n        give_up()\n    try:\n        yield\n"
        "    finally:\n        _one_at_a_time.release()\n",
        "    yield\n",
        f"{POISON_MESSAGES}::test_one_poison_message_is_handled_at_a_time_and_delays_no_other_message",
    ),
    Mutant(
        "a poison event is handled for ever",
        "dovecote/consumer/consumer.py",
        "                if crash_count >= MAX_CRASHES:\n",
        "                if False:\n",
        f"{POISON_MESSAGES}::test_an_event_in_flight_in_three_dying_processes_is_not_handled_again",
    ),
    Mutant(
        "crashes that are explained count against others",
        "dovecote/store/poison.py",
        "self.crashes - counts.explained > known",
        "self.crashes > known",
        f"{POISON_MESSAGES}::test_crashes_that_a_dead_letter_explains_count_against_no_other",
    ),
    Mutant(
        "a crash count outlives a clean requeue",
        "dovecote/broker/lua/requeue.lua",
        "        redis.call('hdel', KEYS[2] .. '.in_flight', ARGV[i])\n",
        "",
        f"{BROKER}::test_each_crash_is_counted_in_the_messages_of_the_dead_and_a_clean_return_is_not",
    ),
    Mutant(
        "an event that is found again on record is dead-lettered again",
        "dovecote/consumer/consumer.py",
        "self._record(alone, {envelope.event_id: _killed(crash_count)}, if_open=True)",
        "self._record(alone, {envelope.event_id: _killed(crash_count)})",
        f"{POISON_MESSAGES}::test_what_is_done_or_on_record_already_is_not_dead_lettered",
    ),
    Mutant(
        "a handler that swallows its being cut off has succeeded",
        "dovecote/consumer/time_limits.py",
        "        if watch.was_cut_off:\n            raise exceeded(watch)",
        "        if watch.was_cut_off and cut_off:\n            raise exceeded(watch)",
        f"{CONSUME}::test_a_handler_that_hangs_is_cut_off_and_its_bundle_mates_go_through",
    ),
    Mutant(
        "the time limit is for the bundle",
        "dovecote/consumer/time_limits.py",
        "        self.deadline = self.began_at + self.seconds\n\n    def cut_off",
        "\n    def cut_off",
        f"{CONSUME}::test_the_limit_is_for_each_event_of_a_bundle",
    ),
    Mutant(
        "a stuck process does not end",
        "dovecote/consumer/stuck.py",
        "    os._exit(_STUCK_EXIT_CODE)\n",
        "    threading.Event().wait()\n",
        f"{POISON}::test_a_handler_that_hangs_in_c_ends_its_process_and_its_mates_go_through",
    ),
    Mutant(
        "a stuck process says nothing when it ends",
        "dovecote/consumer/stuck.py",
        "deliveries.record_failures([Attempt.of(envelope, error).after(so_far[envelope.event_id], watch.route)])\n",
        "pass\n",
        f"{POISON}::test_a_handler_that_hangs_in_c_ends_its_process_and_its_mates_go_through",
    ),
    # Handlers as people write them --------------------------------------------------------------
    Mutant(
        "nobody looks at the transaction after a call",
        "dovecote/consumer/transaction.py",
        "        guard.check()\n",
        "",
        f"{CARELESS}::test_on_an_engine_of_somebody_else_s_it_is_noticed_after_the_call",
    ),
    Mutant(
        "a handler may commit",
        "dovecote/store/watched.py",
        "                self.watcher.before_commit()\n",
        "                pass\n",
        f"{CARELESS}::test_a_connection_that_a_careless_handler_had_is_as_good_as_new",
    ),
    Mutant(
        "what failed is committed all the same",
        "dovecote/store/watched.py",
        "            if self.pgconn.transaction_status == TransactionStatus.INERROR:\n",
        "            if False:\n",
        f"{CARELESS}::test_a_caller_that_passes_over_an_error_hears_of_it_at_the_commit",
    ),
    Mutant(
        "a commit that is refused leaves its transaction open",
        "dovecote/store/watched.py",
        "        except BaseException:\n            super().rollback()\n            raise\n",
        "        except BaseException:\n            raise\n",
        "tests/dovecote/store/test_watched.py::test_a_commit_that_is_refused_leaves_no_transaction_open",
    ),
    Mutant(
        "a transaction goes back to the pool",
        "dovecote/store/watched.py",
        "            connection.rollback()\n",
        "            pass\n",
        "tests/dovecote/store/test_watched.py::test_what_sqlalchemy_takes_for_ended_goes_back_to_the_pool_without_its_transact"
        "i"
        "o"
        "n",
    ),
    Mutant(
        "a rollback is not noted",
        "dovecote/store/watched.py",
        "            self.watcher.before_rollback()\n",
        "            pass\n",
        f"{CARELESS}::test_what_a_handler_does_to_its_transaction_is_its_failure_and_its_mates_go_through",
    ),
    Mutant(
        "only the first statement of a text is read",
        "dovecote/consumer/statements.py",
        '        if sign == ";" and parentheses == 0 and blocks == 0:\n',
        "        if False:\n",
        f"{CARELESS}::test_what_a_handler_does_to_its_transaction_is_its_failure_and_its_mates_go_through"
        "[SQL in between-single]",
    ),
    Mutant(
        "words in literals are commands",
        "dovecote/consumer/statements.py",
        "    | '[^']*'\n",
        "",
        f"{CARELESS}::test_what_leaves_the_transaction_whole_is_allowed[words in literals-single]",
    ),
    Mutant(
        "settings are not compared",
        "dovecote/consumer/transaction_guard.py",
        "        changed = [name for name, setting in before.items() if now.get(name) != setting]\n",
        "        changed: list[str] = []\n",
        f"{CARELESS}::test_a_setting_of_another_event_is_blamed_on_the_one_that_set_it",
    ),
    Mutant(
        "an open stream is rolled back for ever",
        "dovecote/consumer/transaction.py",
        "isinstance(error, TimeLimitExceeded) or not guard.can_roll_back()",
        "isinstance(error, TimeLimitExceeded)",
        f"{CARELESS}::test_what_a_handler_does_to_its_transaction_is_its_failure_and_its_mates_go_through"
        "[driver.close()-single]",
    ),
    Mutant(
        "a handler that returns a coroutine has succeeded",
        "dovecote/consumer/transaction.py",
        "require_nothing_returned(self._route.handler, self._route.function(argument, self._uow, self._gateways))\n",
        "self._route.function(argument, self._uow, self._gateways)\n",
        f"{CARELESS}::test_a_handler_that_returns_something_has_failed",
    ),
    Mutant(
        "an async handler is a handler",
        "dovecote/route.py",
        "        require_callable(self.handler, self.function)\n",
        "",
        f"{ROUTES}::test_a_route_takes_what_acts_when_it_is_called_and_nothing_else",
    ),
    Mutant(
        "two handlers of one name share their messages",
        "dovecote/relay/bundler.py",
        "        routes = distinct(routes)\n",
        "",
        f"{ROUTES}::test_two_routes_of_one_handler_name_are_refused_wherever_a_system_is_put_together",
    ),
    Mutant(
        "a long name counts by its beginning",
        "dovecote/relay/bundler.py",
        "    return name if len(name) <= blake2b.MAX_KEY_SIZE else blake2b(name).digest()\n",
        "    return name[:64]\n",
        f"{ROUTES}::test_the_whole_name_of_a_handler_is_in_its_messages_ids",
    ),
    Mutant(
        "what cannot be read enters the transaction",
        "dovecote/consumer/consumer.py",
        "                self._consume_in_parts(self._without_unreadable(bundle))\n",
        "                self._consume_in_parts(bundle)\n",
        f"{BAD_EVENTS}::test_what_cannot_be_read_enters_no_transaction_of_the_handler",
    ),
    Mutant(
        "what is done is recorded as unreadable",
        "dovecote/consumer/consumer.py",
        "those = deliveries.still_open(bundle.of(found.to_do)) if if_open else found.to_do",
        "those = found.to_do",
        f"{BAD_EVENTS}::test_what_is_done_is_not_recorded_when_it_comes_again_and_cannot_be_read",
    ),
    Mutant(
        "nobody is blamed",
        "dovecote/consumer/consumer.py",
        "parts.failed(failure.blamed, was_slow",
        "parts.failed(None, was_slow",
        f"{BAD_EVENTS}::test_a_bundle_with_bad_events_takes_few_transactions",
    ),
    Mutant(
        "a bad one makes all others go alone",
        "dovecote/consumer/parts.py",
        "            self._limit *= 2\n",
        "            self._limit = 1\n",
        f"{BAD_EVENTS}::test_a_bundle_with_bad_events_takes_few_transactions[False-1-6]",
    ),
)
