"""The checker finds what it is there to find, in a history that is well but for one thing."""

from dataclasses import replace

import pytest

from tests.chaos.checker import judge, longest_stall_seconds, recovery_seconds
from tests.chaos.history import Charge, Committed, Effect, Forgotten, History, Rewind, read_journals
from tests.chaos.schedule import Fault

LEDGER, BULK = "chaos.ledger", "chaos.bulk"


def charges(*event_ids: str, began_at: float = 1_000.0) -> tuple[Charge, ...]:
    return tuple(Charge(event_id, began_at) for event_id in event_ids)


def a_history() -> History:
    """Three events of one account, a second apart, each acted on half a second later by two handlers."""
    committed = [Committed(f"e{seq}", "a", seq, 100 * seq, at=1_000.0 + seq) for seq in (1, 2, 3)]
    effects = [
        Effect(handler, one.id, "a", one.seq, one.seq if handler == LEDGER else None, one.at + 0.5)
        for one in committed
        for handler in (LEDGER, BULK)
    ]
    return History(
        handlers=(LEDGER, BULK),
        ordered=(LEDGER,),
        committed={one.id: one for one in committed},
        effects=tuple(effects),
        ledger={"a": (3, 600)},
        charges=charges("e1", "e2", "e3"),
    )


def test_a_history_that_is_well_is_well() -> None:
    verdict = judge(a_history())

    assert verdict.kept
    assert verdict.sentences == ()


@pytest.mark.parametrize("number", range(6))
def test_every_effect_that_is_missing_is_found(number: int) -> None:
    history = a_history()
    effects = history.effects[:number] + history.effects[number + 1 :]

    verdict = judge(replace(history, effects=effects))

    gone = history.effects[number]
    assert len(verdict.lost) == 1
    assert gone.handler in verdict.lost[0]
    assert gone.event_id in verdict.lost[0]
    assert not verdict.kept


def test_a_mistake_of_a_handler_that_nobody_reported_is_found() -> None:
    made = replace(a_history(), mistakes=frozenset({(LEDGER, "e1"), (LEDGER, "e2")}))

    verdict = judge(replace(made, reported=frozenset({(LEDGER, "e2")})))

    assert verdict.unreported == (f"{LEDGER} made a mistake with e1, and no failure was recorded",)
    assert not verdict.kept


@pytest.mark.parametrize("number", range(6))
def test_every_effect_that_is_doubled_is_found(number: int) -> None:
    history = a_history()
    again = replace(history.effects[number], step=4)

    verdict = judge(replace(history, effects=(*history.effects, again)))

    assert verdict.doubled == (f"{again.handler} acted 2 times on {again.event_id}",)
    assert not verdict.kept


def test_an_effect_of_what_was_rolled_back_is_found() -> None:
    history = a_history()
    ghost = Effect(BULK, "e9", "a", 4, None, 1_005.0)

    verdict = judge(replace(history, effects=(*history.effects, ghost)))

    assert verdict.never_committed == ("chaos.bulk acted on e9, which was rolled back",)
    assert not verdict.kept


def test_two_effects_that_changed_places_are_found_by_their_steps_not_by_their_times() -> None:
    history = a_history()
    steps = {"e1": 1, "e2": 3, "e3": 2}
    effects = tuple(replace(one, step=steps[one.event_id]) if one.step else one for one in history.effects)

    verdict = judge(replace(history, effects=effects))

    assert verdict.out_of_order == ("chaos.ledger acted on event 2 of a after event 3",)
    assert not verdict.kept


def test_the_order_of_an_unordered_handler_is_nobody_s_business() -> None:
    history = a_history()

    assert judge(replace(history, effects=tuple(reversed(history.effects)))).kept


@pytest.mark.parametrize("ledger", [{"a": (3, 599)}, {"a": (2, 600)}, {}, {"a": (3, 600), "b": (1, 5)}])
def test_a_ledger_that_does_not_add_up_is_found(ledger: dict[str, tuple[int, int]]) -> None:
    assert len(judge(replace(a_history(), ledger=ledger)).wrong_sums) == 1


def test_a_provider_that_was_not_asked_or_asked_for_a_ghost_is_found() -> None:
    verdict = judge(replace(a_history(), charges=charges("e1", "e2", "e9")))

    assert verdict.wrong_sums == (
        "the provider was never asked for e3",
        "the provider was asked for e9, which was rolled back",
    )


# Postgres went back at 1,002.9 and forgot e4, the third event of the account at that time. The third event is now e3.
FORGOTTEN = {"e4": Forgotten("e4", at=1_002.9, answered=True)}


def test_what_postgres_forgot_is_not_due() -> None:
    assert judge(replace(a_history(), forgotten=FORGOTTEN)).kept


@pytest.mark.parametrize("answered", [True, False])
def test_an_effect_of_what_postgres_forgot_is_a_phantom_and_no_more_than_that(answered: bool) -> None:
    history = replace(a_history(), forgotten={"e4": Forgotten("e4", at=1_002.9, answered=answered)})
    phantom = Effect(LEDGER, "e4", "a", 3, 2, 1_003.0)
    effects = tuple(replace(one, step=one.step + 1) if one.step and one.step > 1 else one for one in history.effects)

    verdict = judge(replace(history, effects=(*effects, phantom)))

    assert verdict.sentences == ("chaos.ledger acted on e4, which Postgres had forgotten",)
    assert verdict.phantoms == verdict.sentences


def test_the_provider_may_be_asked_for_what_is_forgotten_later_by_a_handler_that_had_begun() -> None:
    history = a_history()

    verdict = judge(replace(history, forgotten=FORGOTTEN, charges=(*history.charges, *charges("e4", began_at=1_002.8))))

    assert verdict.kept


def test_the_provider_may_not_be_asked_for_what_is_forgotten_by_a_handler_that_began_since() -> None:
    history = a_history()

    verdict = judge(
        replace(history, forgotten=FORGOTTEN, charges=(*history.charges, *charges("e4", "e4", began_at=1_003.0)))
    )

    assert verdict.sentences == ("the provider was asked for e4, which Postgres had forgotten",)
    assert verdict.phantoms == verdict.sentences


def test_what_postgres_remembers_is_lost_without_an_effect_also_where_other_things_are_forgotten() -> None:
    history = replace(a_history(), forgotten=FORGOTTEN)

    verdict = judge(replace(history, effects=history.effects[:-1]))

    assert verdict.sentences == ("chaos.bulk never acted on e3, event 3 of a",)


def test_where_writers_and_postgres_disagree_the_run_fails() -> None:
    assert not judge(replace(a_history(), contradictions=("transaction x: lost",))).kept


# Journals ----------------------------------------------------------------------------------------


def asked(transaction: str, at: float = 5.0) -> dict[str, object]:
    events = [{"id": f"e-{transaction}", "account": "a", "seq": 1, "cents": 1}]
    return {"transaction": transaction, "events": events, "at": at}


def heard(transaction: str) -> dict[str, object]:
    return {"transaction": transaction, "committed": True, "at": 6.0}


def test_a_commit_that_nobody_heard_of_is_known_by_its_row() -> None:
    journals = read_journals([asked("t1"), asked("t2")], {"t1"})

    assert list(journals.committed) == ["e-t1"]
    assert journals.committed["e-t1"].at == 5.0
    assert journals.rolled_back == 1
    assert journals.contradictions == []


def test_a_commit_that_was_heard_of_counts_from_then() -> None:
    journals = read_journals([asked("t1"), heard("t1"), {"rolled_back": 1}], {"t1"})

    assert journals.committed["e-t1"].at == 6.0
    assert journals.rolled_back == 1
    assert journals.contradictions == []


def test_a_commit_that_was_heard_of_and_left_no_row_is_a_contradiction_and_still_due() -> None:
    journals = read_journals([asked("t1"), heard("t1")], set())

    assert list(journals.committed) == ["e-t1"]
    assert len(journals.contradictions) == 1


def test_a_row_that_no_writer_asked_for_is_a_contradiction() -> None:
    assert len(read_journals([], {"t1"}).contradictions) == 1


@pytest.mark.parametrize(
    "rewind",
    [
        pytest.param(Rewind(remembered_until=5.9, at=7), id="the answer came after what is remembered"),
        pytest.param(Rewind(remembered_until=4, at=5.1), id="it went back before the answer arrived"),
        pytest.param(Rewind(remembered_until=4, at=9), id="it went back some time later"),
    ],
)
def test_an_answered_commit_without_a_row_is_forgotten_when_postgres_went_back(rewind: Rewind) -> None:
    journals = read_journals([asked("t1"), heard("t1")], set(), [rewind, Rewind(20, 21)])

    assert journals.committed == {}
    assert journals.forgotten == {"e-t1": Forgotten("e-t1", at=rewind.at, answered=True)}
    assert journals.contradictions == []
    assert journals.rolled_back == 0


@pytest.mark.parametrize(
    "rewind",
    [
        pytest.param(Rewind(remembered_until=6.1, at=7), id="answered before: it is remembered"),
        pytest.param(Rewind(remembered_until=3, at=4.9), id="it had gone back before the question"),
    ],
)
def test_an_answered_commit_without_a_row_is_lost_when_postgres_did_not_go_back_behind_it(rewind: Rewind) -> None:
    journals = read_journals([asked("t1"), heard("t1")], set(), [rewind])

    assert list(journals.committed) == ["e-t1"]
    assert journals.forgotten == {}
    assert journals.contradictions == ["transaction t1: the writer heard of a commit that Postgres lost"]


def test_what_is_remembered_the_first_time_must_be_remembered_the_second_time() -> None:
    journals = read_journals([asked("t1"), heard("t1")], set(), [Rewind(6.5, 7), Rewind(4, 9)])

    assert list(journals.committed) == ["e-t1"]
    assert len(journals.contradictions) == 1


def test_a_commit_with_a_row_is_due_whether_postgres_went_back_or_not() -> None:
    journals = read_journals([asked("t1"), heard("t1"), asked("t2")], {"t1", "t2"}, [Rewind(4, 9)])

    assert list(journals.committed) == ["e-t1", "e-t2"]
    assert journals.forgotten == {}


def test_an_unanswered_commit_without_a_row_may_be_forgotten_and_may_be_rolled_back() -> None:
    journals = read_journals([asked("t1")], set(), [Rewind(4, 9)])

    assert journals.forgotten == {"e-t1": Forgotten("e-t1", at=9, answered=False)}
    assert journals.rolled_back == 1
    assert journals.contradictions == []


# Times -------------------------------------------------------------------------------------------


def test_the_longest_stall_is_the_longest_silence_while_something_was_due() -> None:
    # Acted on half a second after each commit, and nothing due in the half second before the next.
    assert longest_stall_seconds(a_history()) == pytest.approx(0.5)

    history = a_history()
    late = tuple(replace(one, at=one.at + 4) if one.event_id == "e3" else one for one in history.effects)
    assert longest_stall_seconds(replace(history, effects=late)) == pytest.approx(4.5)


def test_a_fault_is_over_when_all_that_was_committed_by_its_end_is_done() -> None:
    fault = Fault(0, "worker_killed", 0, 0)

    assert recovery_seconds(a_history(), [(fault, 1_002.1), (fault, 1_002.9)]) == {
        "worker_killed": [pytest.approx(0.4), 0.0]
    }
