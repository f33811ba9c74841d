"""Mutants of events that are not in the outbox, and of paused handlers."""

from tests.mutations.mutant import Mutant

PAUSING = "tests/dovecote/consumer/test_pausing.py"
LOOKUP = "tests/dovecote/store/test_lookup.py"

MUTANTS_OF_LOOKUP = (
    # What is not in the outbox ------------------------------------------------------------------
    Mutant(
        "an event of any order that is not in the outbox is acted on",
        "dovecote/store/deliveries.py",
        "          and event_id not in (select event_id from absent)\n        order by event_id\n",
        "        order by event_id\n",
        f"{LOOKUP}::test_what_is_not_in_the_outbox_is_passed_over_and_its_neighbours_are_not",
    ),
    Mutant(
        "an event in order that is not in the outbox is acted on",
        "dovecote/store/deliveries.py",
        "          and event_id not in (select event_id from absent)\n    ) {REST}",
        "    ) {REST}",
        f"{LOOKUP}::test_what_is_not_in_the_outbox_is_passed_over_and_its_neighbours_are_not",
    ),
    Mutant(
        "a retry that is not in the outbox is acted on",
        "dovecote/store/deliveries.py",
        "select event_id from due where event_id not in (select event_id from absent)",
        "select event_id from due",
        f"{LOOKUP}::test_a_retry_of_what_is_not_in_the_outbox_is_passed_over",
    ),
    Mutant(
        "a failure of what is not in the outbox is recorded",
        "dovecote/consumer/consumer.py",
        "to_record = _ids(found.to_do) & so_far.keys()",
        "so_far |= dict.fromkeys(_ids(found.absent), SoFar())\n                to_record = so_far.keys()",
        f"{LOOKUP}::test_an_event_that_is_forgotten_while_its_handler_fails_gets_no_delivery",
    ),
    Mutant(
        "the last words of a stuck process are of what is not in the outbox",
        "dovecote/consumer/stuck.py",
        "        if lookup.look_up(session, Bundle(watch.route, [envelope])).absent:\n            return\n",
        "",
        f"{LOOKUP}::test_an_event_that_is_forgotten_while_its_handler_is_stuck_gets_no_delivery",
    ),
    Mutant(
        "another history is a failure of the event",
        "dovecote/consumer/consumer.py",
        "            except (HandlerPaused, lookup.OtherHistory):\n",
        "            except HandlerPaused:\n",
        f"{LOOKUP}::test_messages_of_another_history_are_held_until_it_is_ours",
    ),
    Mutant(
        "a consumer does not ask Redis for the history",
        "dovecote/bootstrap.py",
        "        consumer.history_in_redis = partial(history_in, broker.client, broker.namespace)\n",
        "",
        f"{LOOKUP}::test_messages_of_another_history_are_held_until_it_is_ours",
    ),
    Mutant(
        "a DBA's choice of synchronous_commit is lowered",
        "dovecote/store/connections.py",
        "pg_catalog.current_setting('synchronous_commit') = 'off'",
        "true",
        f"{LOOKUP}::test_what_a_message_is_acknowledged_for_is_committed_durably",
    ),
    Mutant(
        "an operator's change is lost in a crash",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "        perform set_config('synchronous_commit', 'on', true);",
        "        perform 1;",
        f"{LOOKUP}::test_what_a_message_is_acknowledged_for_is_committed_durably",
    ),
    # Pausing ------------------------------------------------------------------------------------
    Mutant(
        "a paused handler acts on new events",
        "dovecote/store/deliveries.py",
        "d.event_id = bundle.event_id)\n"
        "          and not exists (select from dovecote.paused_handlers where handler_name = %(handler_name)s)\n",
        "d.event_id = bundle.event_id)\n",
        f"{PAUSING}::test_retries_of_a_paused_handler_wait_for_it_and_spend_no_attempt",
    ),
    Mutant(
        "a paused ordered handler acts on new events",
        "dovecote/store/deliveries.py",
        "any(%(event_ids)s::uuid[]))\n"
        "          and not exists (select from dovecote.paused_handlers where handler_name = %(handler_name)s)\n",
        "any(%(event_ids)s::uuid[]))\n",
        f"{PAUSING}::test_a_paused_handler_gets_what_it_missed_in_order_and_its_neighbour_never_waits[kind1]",
    ),
    Mutant(
        "a paused handler is taken for one with nothing to do",
        "dovecote/store/pauses.py",
        "        raise HandlerPaused(handler_name)\n",
        "        pass\n",
        f"{PAUSING}::test_a_redis_that_is_wiped_while_a_handler_is_paused_takes_nothing_away",
    ),
    Mutant(
        "what was held comes back newest first",
        "dovecote/broker/lua/resume_held.lua",
        "'RIGHT', 'LEFT'",
        "'LEFT', 'LEFT'",
        f"{PAUSING}::test_a_paused_handler_gets_what_it_missed_in_order_and_its_neighbour_never_waits[kind0]",
    ),
    Mutant(
        "what is held after the resume stays held",
        "dovecote/relay/leader.py",
        "            self._retry_while_unavailable(self._reap)\n"
        "            self._retry_while_unavailable(self._resume_held)\n",
        "            self._retry_while_unavailable(self._reap)\n",
        f"{PAUSING}::test_what_is_being_held_while_the_handler_is_resumed_is_not_forgotten",
    ),
)
