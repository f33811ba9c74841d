"""Mutants of the low-water marks and of what is counted from them."""

from tests.mutations.mutant import Mutant

MARKS = "tests/dovecote/relay/test_low_water_marks.py"
STATUS = "tests/dovecote/operations/test_status.py"

PROGRESS_SQL = "migrations/sql/0022_progress.up.sql"
LOCKS_SQL = "migrations/sql/0032_leader_lock.up.sql"
PROGRESS_PY = "dovecote/relay/low_water_marks.py"

HISTORIES = f"{MARKS}::test_a_mark_is_true_at_every_step_of_a_random_history_and_exact_at_its_end"
WITH_A_RELAY = f"{MARKS}::test_a_relay_moves_the_marks_says_nothing_when_idle_and_begins_anew_when_cut_off"
BEGINS_TO_WANT = f"{MARKS}::test_what_a_handler_begins_to_want_below_its_mark_is_open"
FORGOTTEN = f"{MARKS}::test_a_forgotten_handler_has_no_mark_and_what_is_reopened_is_looked_at_again"
IN_THE_WAY = f"{MARKS}::test_what_is_in_the_way_is_not_looked_for_below_the_mark_unless_it_failed_there"

PROGRESS = (
    Mutant(
        "a position that may be committed late is passed",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "p.open - looked + not_there + coalesce(u.ranges",
        "p.open - looked + coalesce(u.ranges",
        f"{MARKS}::test_a_mark_is_true_at_every_step_of_a_random_history_and_exact_at_its_end[1]",
    ),
    Mutant(
        "a version that nobody knows yet is passed",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "s.handler_name = any(handlers) and dovecote.event_name(s.event_type) = dovecote.event_name(t.name)",
        "s.handler_name = any(handlers) and s.event_type = t.name",
        f"{MARKS}::test_a_new_version_of_a_wanted_event_was_waited_for_before_anybody_knew_it",
    ),
    Mutant(
        "a replaced relay moves marks",
        "dovecote/migrations/sql/0005_progress.up.sql",
        " where s.epoch = leading_epoch;",
        ";",
        f"{MARKS}::test_a_mark_is_true_at_every_step_of_a_random_history_and_exact_at_its_end[1]",
    ),
    Mutant(
        "a handler subscribes while a step is under way",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "    lock table dovecote.progress_lock in share update exclusive mode;\n    insert into dovecote.progress",
        "    insert into dovecote.progress",
        f"{MARKS}::test_nobody_subscribes_while_a_step_is_under_way",
    ),
    Mutant(
        "of two versions at once neither is open",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "and (s.handler_name, s.event_type) not in (select b.handler_name, b.event_type from added b)",
        "and s.event_type <> a.event_type",
        f"{MARKS}::test_what_a_handler_begins_to_want_below_its_mark_is_open",
    ),
    Mutant(
        "what a handler begins to want is not open",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "    where before.since_position is null\n       or ",
        "    where ",
        f"{MARKS}::test_what_a_handler_begins_to_want_below_its_mark_is_open",
    ),
    Mutant(
        "an earlier begin opens nothing",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "    when (new.since_position < old.since_position or",
        "    when (false or",
        f"{MARKS}::test_what_a_handler_begins_to_want_below_its_mark_is_open",
    ),
    Mutant(
        "a forgotten handler keeps its mark",
        "dovecote/migrations/sql/0007_operators.up.sql",
        "    delete from dovecote.progress p where p.handler_name = handler;\n",
        "",
        f"{MARKS}::test_a_forgotten_handler_has_no_mark_and_what_is_reopened_is_looked_at_again",
    ),
    Mutant(
        "nothing is opened again",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "set open = int8multirange(int8range(wanted.since, greatest(",
        "set open = int8multirange(int8range(p.examined, greatest(",
        f"{MARKS}::test_a_forgotten_handler_has_no_mark_and_what_is_reopened_is_looked_at_again",
    ),
    Mutant(
        "ranges are dropped when there are too many",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "int8range((select min(low) from part)",
        "int8range((select max(low) from part)",
        f"{MARKS}::test_a_mark_is_true_at_every_step_of_a_random_history_and_exact_at_its_end[1]",
    ),
    Mutant(
        "every look begins at the lowest mark",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "case when q.examined - q.low_water_mark <= max_events / 2 then q.low_water_mark else q.examined end",
        "q.low_water_mark",
        f"{MARKS}::test_every_event_is_read_once_and_a_backlog_costs_a_read_of_its_head",
    ),
    Mutant(
        "what is dead below the mark blocks nothing",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "d.state = 'dead' and",
        "false and",
        f"{MARKS}::test_what_is_in_the_way_is_not_looked_for_below_the_mark_unless_it_failed_there",
    ),
    Mutant(
        "the way is looked for in all that an aggregate has",
        "dovecote/migrations/sql/0006_order.up.sql",
        "          and o.position > (select dovecote.unblocked_up_to(handler))\n"
        "          and (s.published_above is null or not s.published_above @> o.position)\n"
        "          and not exists",
        "          and (s.published_above is null or not s.published_above @> o.position)\n          and not exists",
        f"{MARKS}::test_what_is_in_the_way_is_not_looked_for_below_the_mark_unless_it_failed_there",
    ),
    Mutant(
        "a week goes up to what was examined",
        "dovecote/migrations/sql/0010_retention.up.sql",
        "coalesce(p.low_water_mark, 0) as low_water_mark",
        "coalesce(p.examined, 0) as low_water_mark",
        f"{MARKS}::test_a_mark_is_true_at_every_step_of_a_random_history_and_exact_at_its_end",
    ),
    Mutant(
        "what nobody has examined is not counted",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "select p.open + int8multirange(int8range(p.examined, null, '()')) into ranges",
        "select p.open into ranges",
        f"{STATUS}::test_a_history_that_nobody_has_examined_yet_is_never_said_to_be_done",
    ),
    Mutant(
        "an unfinished count looks exact",
        "dovecote/migrations/sql/0005_progress.up.sql",
        "            at_least := true;\n            return;",
        "            return;",
        f"{STATUS}::test_a_history_that_nobody_has_examined_yet_is_never_said_to_be_done",
    ),
    Mutant(
        "an unfinished count is reported as exact",
        "dovecote/operations/unprocessed.py",
        "_is_cut(row) or bool(",
        "bool(",
        f"{STATUS}::test_a_history_that_nobody_has_examined_yet_is_never_said_to_be_done",
    ),
    Mutant(
        "the marks are asked for in an idle system",
        PROGRESS_PY,
        "if upto == self._moved_upto and (not self._is_open or now < self._next_look):",
        "if upto < 0:",
        f"{MARKS}::test_a_relay_moves_the_marks_says_nothing_when_idle_and_begins_anew_when_cut_off",
    ),
    Mutant(
        "an error ends the marks",
        PROGRESS_PY,
        "            except Exception as error:",
        "            except ZeroDivisionError as error:",
        f"{MARKS}::test_a_relay_moves_the_marks_says_nothing_when_idle_and_begins_anew_when_cut_off",
    ),
)
